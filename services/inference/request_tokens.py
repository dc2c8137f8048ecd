"""Reading prompts, tokens and positions out of request messages."""

from collections.abc import Sequence

from tdb.inference.v1 import intervention_pb2, model_pb2
from tdb.type.v1 import token_pb2

from services.common.errors import InvalidArgument, inside
from services.inference.engine.model import Model
from services.inference.engine.text import ChatMessage

MAX_TOKEN_REFS = 100
MAX_CHAT_MESSAGES = 1_000
MAX_DOCUMENTS = 10_000


def prompt_ids(prompt: token_pb2.Prompt, model: Model) -> tuple[int, ...]:
    """The ids a prompt stands for, at least one and no more than the context holds."""
    source = prompt.WhichOneof("source")
    if prompt.HasField("prepend_bos") and source in ("token_ids", "chat"):
        raise InvalidArgument(
            f"prepend_bos is for text; with {source} every token is stated already",
            field="prepend_bos",
        )
    match source:
        case "text":
            bos = prompt.prepend_bos if prompt.HasField("prepend_bos") else None
            with inside("text"):
                ids = model.vocabulary.encode(prompt.text, bos)
        case "token_ids":
            ids = tuple(prompt.token_ids.ids)
            _check_length(ids, source, model)  # before each is looked at
            for number, each in enumerate(ids):
                with inside(f"token_ids.ids[{number}]"):
                    model.vocabulary.check_id(each)
        case "chat":
            ids = _chat_ids(prompt.chat, model)
        case _:
            raise InvalidArgument("one of text, token_ids or chat is required", field="source")
    if not ids:
        raise InvalidArgument("the prompt is empty; at least one token is required", field=source)
    _check_length(ids, source, model)
    return ids


def _check_length(ids: Sequence[int], source: str, model: Model) -> None:
    if len(ids) > model.architecture.context:
        raise InvalidArgument(
            f"the prompt has {len(ids)} tokens; this model reads at most "
            f"{model.architecture.context}",
            field=source,
        )


def canonical_ids(prompt: token_pb2.Prompt, model: Model) -> tuple[int, ...]:
    """The ids a prompt stands for, which are all that is left in it."""
    ids = prompt_ids(prompt, model)
    prompt.Clear()
    prompt.token_ids.ids.extend(ids)
    return ids


def _chat_ids(chat: token_pb2.Chat, model: Model) -> tuple[int, ...]:
    if not chat.messages:
        raise InvalidArgument("at least one message is required", field="chat.messages")
    if len(chat.messages) > MAX_CHAT_MESSAGES:
        raise InvalidArgument(
            f"{len(chat.messages)} messages are given; at most {MAX_CHAT_MESSAGES} are read",
            field="chat.messages",
        )
    for number, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidArgument(
                "a role is required, for example user", field=f"chat.messages[{number}].role"
            )
    messages = [ChatMessage(message.role, message.content) for message in chat.messages]
    answer_follows = not chat.HasField("add_generation_prompt") or chat.add_generation_prompt
    with inside("chat"):
        return model.vocabulary.encode_chat(messages, answer_follows)


def documents(request: model_pb2.TokenizeRequest, model: Model) -> model_pb2.TokenizeResponse:
    """The ids of each text of a request; a document may be empty and of any length."""
    if request.HasField("prompt"):
        raise InvalidArgument("is refused with documents: send two calls", field="prompt")
    if len(request.documents) > MAX_DOCUMENTS:
        raise InvalidArgument(
            f"{len(request.documents)} documents are given; at most {MAX_DOCUMENTS} in a call",
            field="documents",
        )
    with inside("documents"):
        found = model.vocabulary.encode_documents(request.documents)
    return model_pb2.TokenizeResponse(documents=[token_pb2.TokenIds(ids=ids) for ids in found])


def positions(
    message: intervention_pb2.Positions, tokens: int, prompt: int | None = None
) -> tuple[int, ...]:
    """Positions in the order given; raises where one does not exist or stands twice.

    `tokens` is how many there are; during generation `prompt` says how many of them are the
    prompt's, else None.
    """
    match message.WhichOneof("which"):
        case "all":
            return tuple(range(tokens))
        case "start":
            if not 0 <= message.start < tokens:
                raise InvalidArgument(
                    f"position {message.start} does not exist; valid is 0..{tokens - 1}",
                    field="start",
                )
            return tuple(range(message.start, tokens))
        case "generated":
            return _generated_positions(tokens, prompt)
        case "list":
            return _listed_positions(message.list.positions, tokens)
        case _:
            raise InvalidArgument("one of all, list, start or generated is required", field="which")


def _generated_positions(tokens: int, prompt: int | None) -> tuple[int, ...]:
    if prompt is None:
        raise InvalidArgument(
            "no positions are generated here, only Generate adds some; name others",
            field="generated",
        )
    if tokens == prompt:
        raise InvalidArgument(
            "with max_new_tokens 1 the model reads no generated token: the last one is never run",
            field="generated",
        )
    return tuple(range(prompt, tokens))


def _listed_positions(positions: Sequence[int], tokens: int) -> tuple[int, ...]:
    if not positions:
        raise InvalidArgument("at least one position is required", field="list.positions")
    listed: set[int] = set()
    for number, position in enumerate(positions):
        field = f"list.positions[{number}]"
        if not 0 <= position < tokens:
            raise InvalidArgument(
                f"position {position} does not exist; valid is 0..{tokens - 1}", field=field
            )
        if position in listed:
            raise InvalidArgument(f"position {position} is listed twice", field=field)
        listed.add(position)
    return tuple(positions)


def write_positions(message: intervention_pb2.Positions, positions: Sequence[int]) -> None:
    message.Clear()
    message.list.positions.extend(positions)


def token_ids(refs: Sequence[token_pb2.TokenRef], name: str, model: Model) -> tuple[int, ...]:
    """Ids of a list of tokens, each named once; the list is rewritten to ids in place."""
    if len(refs) > MAX_TOKEN_REFS:
        raise InvalidArgument(
            f"{len(refs)} tokens are given; at most {MAX_TOKEN_REFS} are read", field=name
        )
    ids: list[int] = []
    for number, ref in enumerate(refs):
        with inside(f"{name}[{number}]"):
            token_id = _token_id(ref, model)
            if token_id in ids:
                token = model.vocabulary.token(token_id).text
                raise InvalidArgument(f"{token!r} is listed twice; name it once")
        ids.append(token_id)
        ref.id = token_id
    return tuple(ids)


def _token_id(ref: token_pb2.TokenRef, model: Model) -> int:
    match ref.WhichOneof("ref"):
        case "text":
            with inside("text"):
                return model.vocabulary.single(ref.text)
        case "id":
            with inside("id"):
                return model.vocabulary.check_id(ref.id)
        case _:
            raise InvalidArgument("a token is named by text or by id; neither is set", field="ref")
