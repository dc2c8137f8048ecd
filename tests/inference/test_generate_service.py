"""Generate over real gRPC and over HTTP: tokens as they come, twin, replay, refusals."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.json_format import MessageToDict, Parse, ParseDict
from tdb.inference.v1 import generate_pb2, model_pb2, run_pb2, service_pb2_grpc

from services.common.server import ServiceServer
from services.common.settings import ModelSource, Settings
from services.inference.engine.generation import Continuation
from services.inference.engine.model import Model
from services.inference.engine.text import Vocabulary
from services.inference.engine.transcript import Transcript
from services.inference.scheduler import Scheduler
from services.inference.server import build_server, load_model
from tests.common.backend import SERVICE
from tests.gateway.helpers import running
from tests.inference.helpers import CONTEXT
from tests.inference.test_refusals import refusal_of

if TYPE_CHECKING:  # the stubs name it, the generated module does not
    from tdb.inference.v1.service_pb2_grpc import InferenceServiceAsyncStub as Stub

PROMPT = {"text": "When Mary and John went"}
STEERED = [{"target": "resid_post.0", "scale": {"factor": 4.0}}]
RUN: dict[str, Any] = {"prompt": PROMPT}
EDITED: dict[str, Any] = {"prompt": PROMPT, "interventions": STEERED}


def request(**more: Any) -> generate_pb2.GenerateRequest:
    tree = {"run": RUN, "maxNewTokens": 8, "pastEnd": True, **more}
    kept = {name: value for name, value in tree.items() if value is not None}
    return ParseDict(kept, generate_pb2.GenerateRequest())


class Answer:
    """A whole stream of `Generate`."""

    def __init__(self, messages: list[generate_pb2.GenerateResponse]) -> None:
        self.events = [str(each.WhichOneof("event")) for each in messages]
        self.tokens = [each.token for each in messages if each.HasField("token")]
        self.summary = messages[-1].summary
        self.ids = [list(each.token_ids.ids) for each in self.summary.continuations]

    def of(self, branch: Any) -> list[generate_pb2.GeneratedToken]:
        return [each for each in self.tokens if each.branch == branch]


async def generated(stub: "Stub", **more: Any) -> Answer:
    return Answer([each async for each in stub.Generate(request(**more))])


async def test_tokens_come_one_by_one_and_the_summary_repeats_them(stub: "Stub") -> None:
    answer = await generated(stub, topLogProbs=3)
    assert answer.events == ["progress", *["token"] * 8, "summary"]
    (continuation,) = answer.summary.continuations
    assert [each.token.id for each in answer.tokens] == answer.ids[0]
    assert "".join(each.text for each in answer.tokens) == continuation.text
    assert continuation.finish_reason == generate_pb2.FINISH_REASON_LENGTH
    assert {each.branch for each in answer.tokens} == {generate_pb2.BRANCH_EDITED}
    prompt = len(answer.summary.manifest.token_ids[0].ids) - 7
    assert [each.position for each in answer.tokens] == list(range(prompt, prompt + 8))
    for each in answer.tokens:
        scores = [top.score for top in each.top]
        assert scores == sorted(scores, reverse=True)
        assert each.top[0].token == each.token  # greedy
        assert each.log_prob == each.top[0].score < 0


async def test_greedy_is_what_run_says_again_and_again(stub: "Stub") -> None:
    answer = await generated(stub, run=EDITED)
    ids = list(answer.summary.manifest.token_ids[0].ids)[:-7]
    for token in answer.tokens:
        prompt = {"tokenIds": {"ids": ids}}
        run = await stub.Run(
            ParseDict(
                {"run": {"prompt": prompt, "interventions": STEERED}, "topK": 1},
                run_pb2.RunRequest(),
            )
        )
        top = run.next_tokens[0].top[0]
        assert top.token.id == token.token.id
        assert top.probability == pytest.approx(2.718281828459045**token.log_prob, rel=1e-3)
        ids.append(token.token.id)
    plain = await generated(stub)
    assert plain.ids != answer.ids  # the edit did something


async def test_a_twin_is_the_call_without_interventions(stub: "Stub") -> None:
    sampling = {"temperature": 1.5, "topP": 0.95, "topK": 40, "seed": 3}
    both = await generated(stub, run=EDITED, twin=True, **sampling)
    edited = await generated(stub, run=EDITED, **sampling)
    clean = await generated(stub, **sampling)
    assert both.ids == [*edited.ids, *clean.ids]
    assert [each.branch for each in both.summary.continuations] == [1, 2]
    assert [each.token.id for each in both.of(generate_pb2.BRANCH_TWIN)] == clean.ids[0]
    assert both.of(generate_pb2.BRANCH_EDITED) == edited.tokens
    assert [each.branch for each in both.tokens[:4]] == [1, 2, 1, 2]
    assert len(both.summary.manifest.token_ids) == 2
    assert both.summary.receipts == edited.summary.receipts
    assert both.summary.receipts[0].sites == len(both.summary.manifest.token_ids[0].ids)


async def test_the_manifest_replays_unseeded_sampling_exactly(stub: "Stub") -> None:
    first = await generated(stub, temperature=2.0, maxNewTokens=12, run=EDITED)
    canonical = json.loads(first.summary.manifest.request_json)
    assert 0 <= canonical["seed"] < 2**31
    replay = Parse(first.summary.manifest.request_json, generate_pb2.GenerateRequest())
    again = Answer([each async for each in stub.Generate(replay)])
    assert again.tokens == first.tokens
    assert again.summary.manifest.result_id == first.summary.manifest.result_id
    assert again.summary.manifest.request_json == first.summary.manifest.request_json
    other = await generated(stub, temperature=2.0, maxNewTokens=12, run=EDITED)
    assert other.summary.manifest.result_id != first.summary.manifest.result_id


async def test_stops_end_it_and_are_kept(stub: "Stub") -> None:
    sampling = {"temperature": 3.0, "seed": 2}
    free = await generated(stub, **sampling)
    texts = [each.text for each in free.tokens]
    stop = next(text for text in texts[3:] if text.isascii() and text)
    needed = next(number for number in range(9) if stop in "".join(texts[:number]))
    by_text = await generated(stub, stop=["never there", stop], **sampling)
    (continuation,) = by_text.summary.continuations
    assert continuation.finish_reason == generate_pb2.FINISH_REASON_STOP_TEXT
    assert by_text.ids[0] == free.ids[0][:needed]
    assert stop in continuation.text
    token = free.ids[0][2]
    by_token = await generated(stub, stopTokens=[{"id": token}], pastEnd=False, **sampling)
    (continuation,) = by_token.summary.continuations
    assert continuation.finish_reason == generate_pb2.FINISH_REASON_STOP_TOKEN
    assert by_token.ids[0] == free.ids[0][: free.ids[0].index(token) + 1]


async def test_by_default_the_end_of_sequence_token_ends_it(stub: "Stub") -> None:
    answer = await generated(stub, pastEnd=None, maxNewTokens=None)
    end = (await stub.GetModel(model_pb2.GetModelRequest())).tokenizer.eos_id
    canonical = json.loads(answer.summary.manifest.request_json)
    assert canonical["stopTokens"] == [{"id": end}]
    prompt = len(canonical["run"]["prompt"]["tokenIds"]["ids"])
    assert canonical["maxNewTokens"] == CONTEXT - prompt  # less than 32 fit


async def test_positions_beyond_the_prompt(stub: "Stub") -> None:
    def zeroed(**where: Any) -> dict[str, Any]:
        return {"prompt": PROMPT, "interventions": [{"target": "mlp.1", "zero": {}, **where}]}

    whole = await generated(stub, run=zeroed())
    read = list(range(len(whole.summary.manifest.token_ids[0].ids)))
    prompt = len(read) - 7
    every = await generated(stub, run=zeroed(positions={"all": {}}))
    assert every.ids == whole.ids
    assert list(every.summary.receipts[0].positions) == read
    only = await generated(stub, run=zeroed(positions={"generated": {}}))
    assert list(only.summary.receipts[0].positions) == read[prompt:]
    late = await generated(stub, run=zeroed(positions={"start": prompt + 2}))
    assert list(late.summary.receipts[0].positions) == read[prompt + 2 :]
    node = f"head.1.0~{prompt + 3}-{prompt + 1}"
    pair = await generated(
        stub,
        run={"prompt": PROMPT, "interventions": [{"target": node, "set": {"value": 0.5}}]},
    )
    (receipt,) = pair.summary.receipts
    assert (receipt.target, receipt.sites) == (node, 1)
    assert list(receipt.positions) == [prompt + 3]
    assert receipt.after == 0.5


async def test_what_was_never_reached_is_said(stub: "Stub") -> None:
    free = await generated(stub)
    prompt = len(free.summary.manifest.token_ids[0].ids) - 7
    late = {"target": f"mlp.1~{prompt + 6}", "zero": {}}
    stopped = await generated(
        stub,
        run={"prompt": PROMPT, "interventions": [late]},
        stopTokens=[{"id": free.ids[0][0]}],
        pastEnd=False,
    )
    (warning,) = stopped.summary.manifest.warnings
    assert "interventions[0]" in warning
    assert "was never applied" in warning
    assert stopped.summary.receipts[0].sites == 0


async def test_it_comes_as_server_sent_events(server: ServiceServer, stub: "Stub") -> None:
    tree = MessageToDict(request())
    headers = {"accept": "text/event-stream"}
    async with running(f"127.0.0.1:{server.port}") as (_, client):
        response = await client.post(f"/{SERVICE}/Generate", json=tree, headers=headers)
        refused = await client.post(
            f"/{SERVICE}/Generate", json={**tree, "topK": 3}, headers=headers
        )
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line[:5] == "data:"]
    assert [*events[0]] == ["progress"]
    assert events[-1] == {}
    texts = [each["token"].get("text", "") for each in events[1:-2]]
    (continuation,) = events[-2]["summary"]["continuations"]
    assert "".join(texts) == continuation["text"]
    (over_grpc,) = (await generated(stub)).summary.continuations
    assert continuation["text"] == over_grpc.text
    assert "at temperature 0 the likeliest token is taken" in refused.text


async def test_other_calls_get_in_between_and_a_cancelled_generation_stops(
    stub: "Stub", scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    original = Continuation.step
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    def counted(self: Continuation, cancel: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            loop.call_soon_threadsafe(gate.set)
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.2), loop).result()
        return original(self, cancel)

    monkeypatch.setattr(Continuation, "step", counted)
    call = stub.Generate(request(maxNewTokens=20))
    reading = asyncio.ensure_future(call.read())
    await gate.wait()
    between = asyncio.ensure_future(scheduler.submit(lambda cancel: steps))
    await asyncio.sleep(0.05)
    assert (await between).result == 3  # it waited for one token, not for twenty
    await reading
    call.cancel()
    await asyncio.sleep(0.2)
    stopped = steps
    await asyncio.sleep(0.2)
    assert steps == stopped


async def test_a_deadline_ends_it_between_tokens(
    stub: "Stub", monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Continuation.step
    steps = 0

    def slow(self: Continuation, cancel: Any) -> Any:
        nonlocal steps
        steps += 1
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.2), loop).result()
        return original(self, cancel)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(Continuation, "step", slow)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drained(stub.Generate(request(), timeout=0.5))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.sleep(0.4)
    assert steps <= 4


async def drained(call: Any) -> None:
    async for _ in call:
        pass


def beyond(message: dict[str, Any]) -> dict[str, Any]:
    return {"run": {"prompt": {"tokenIds": {"ids": [1, 2, 3]}}, "interventions": [message]}}


MALFORMED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no run": ({"run": None}, "run", "a prompt is required"),
    "no prompt": ({"run": {}}, "run.prompt", "a prompt is required"),
    "a full context": (
        {"run": {"prompt": {"tokenIds": {"ids": [1] * CONTEXT}}}, "maxNewTokens": None},
        "run.prompt",
        "nothing can follow it",
    ),
    "no new tokens": ({"maxNewTokens": 0}, "max_new_tokens", "max_new_tokens is 0; valid is 1.."),
    "too many": ({"maxNewTokens": 99}, "max_new_tokens", f"this model reads {CONTEXT}"),
    "negative temperature": ({"temperature": -1}, "temperature", "temperature is -1"),
    "top_k when greedy": ({"topK": 3}, "top_k", "top_k means nothing"),
    "top_p when greedy": ({"topP": 0.5, "temperature": 0}, "top_p", "top_p means nothing"),
    "seed when greedy": ({"seed": 1}, "seed", "seed means nothing"),
    "top_k 0": ({"temperature": 1, "topK": 0}, "top_k", "top_k is 0; valid is 1.."),
    "top_p 0": ({"temperature": 1, "topP": 0}, "top_p", "top_p is 0; valid is above 0"),
    "top_p above 1": ({"temperature": 1, "topP": 1.1}, "top_p", "top_p is 1.1"),
    "negative seed": ({"temperature": 1, "seed": -1}, "seed", "valid is 0..2147483647"),
    "a twin of nothing": ({"twin": True}, "twin", "there are none"),
    "too many alternatives": ({"topLogProbs": 21}, "top_log_probs", "valid is 0..20"),
    "an empty stop": ({"stop": ["x", ""]}, "stop[1]", "1 to 200 characters, this has 0"),
    "a stop twice": ({"stop": ["x", "x"]}, "stop[1]", "listed twice"),
    "too many stops": ({"stop": list(map(str, range(17)))}, "stop", "at most 16"),
    "a stop token of two": (
        {"stopTokens": [{"text": " Mary John"}], "pastEnd": None},
        "stop_tokens[0].text",
        "is 2 tokens, not one",
    ),
    "two sayings of the end": (
        {"stopTokens": [{"id": 3}]},
        "past_end",
        "past_end means nothing",
    ),
    "a node that is never read": (
        beyond({"target": "mlp.0~10", "zero": {}}),
        "run.interventions[0].target",
        "token position 10 does not exist; valid is 0..9",
    ),
    "a start that is never read": (
        beyond({"target": "mlp.0", "positions": {"start": 10}, "zero": {}}),
        "run.interventions[0].positions.start",
        "valid is 0..9",
    ),
    "generated, of one token": (
        {
            **beyond({"target": "mlp.0", "positions": {"generated": {}}, "zero": {}}),
            "maxNewTokens": 1,
        },
        "run.interventions[0].positions.generated",
        "the last one is never run",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_requests_are_refused(name: str, stub: "Stub") -> None:
    change, path, sentence = MALFORMED[name]
    code, field, message = await refusal_of(drained(stub.Generate(request(**change))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert field == path
    assert sentence in message


def test_text_becomes_readable_when_a_character_is_complete(model: Model) -> None:
    vocabulary = model.vocabulary
    text = "wörds 猫 to\nJohn 🙂!"
    ids = vocabulary.encode(text)
    transcript = Transcript(vocabulary, ["猫 t", "nowhere"])
    parts: list[str] = []
    for token_id in ids:
        assert transcript.stopped == ("猫 t" in "".join(parts))
        parts.append(transcript.add(token_id))
    assert "".join(parts) == text
    assert "" in parts  # in the middle of a character
    assert "\ufffd" not in "".join(parts)
    assert transcript.end() == ""
    cut = Transcript(vocabulary)
    shown = [cut.add(token_id) for token_id in vocabulary.encode("猫")[:-1]]
    assert shown == [""] * len(shown)
    assert cut.end() == "\ufffd"


def test_without_a_tokenizer_tokens_show_as_ids() -> None:
    transcript = Transcript(Vocabulary(9, None))
    assert transcript.add(4) + transcript.add(7) + transcript.end() == "<4><7>"


@pytest.fixture
def bare_folder(model_folder: Path, tmp_path: Path) -> Path:
    """The same weights without a tokenizer."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(model_folder / name)
    return folder


async def test_without_a_tokenizer_ids_are_generated_and_stop_texts_refused(
    bare_folder: Path, stub: "Stub", tmp_path: Path, scheduler: Scheduler
) -> None:
    settings = Settings.from_env(
        {"TDB_MODEL": f"bare={bare_folder}", "TDB_DATA_DIR": str(tmp_path)}
    )
    models = {"bare": load_model(ModelSource("bare", str(bare_folder)), None)}
    run = {"prompt": {"tokenIds": {"ids": [5, 9, 31]}}}
    async with (
        build_server(settings, scheduler, models, port=0) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        bare = service_pb2_grpc.InferenceServiceStub(channel)
        answer = await generated(bare, run=run, pastEnd=None)
        ids = answer.ids[0]
        assert answer.summary.continuations[0].text == "".join(f"<{each}>" for each in ids)
        code, field, message = await refusal_of(
            drained(bare.Generate(request(run=run, pastEnd=None, stop=["x"])))
        )
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert (field, "no tokenizer" in message) == ("stop", True)
        code, field, _ = await refusal_of(drained(bare.Generate(request(run=run))))
        assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "past_end")
    # The padded vocabulary's ids are never chosen where a tokenizer says which they are.
    listed = (await stub.GetModel(model_pb2.GetModelRequest())).tokenizer.vocabulary
    hot = await generated(stub, run=run, temperature=50.0, seed=1, maxNewTokens=24)
    assert max(hot.ids[0]) < listed


TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'gave:' }}{% endif %}"
)


@pytest.fixture
def chat_folder(model_folder: Path, tmp_path: Path) -> Path:
    """The same model with a chat template."""
    folder = tmp_path / "chat"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest_asyncio.fixture
async def chatting(
    chat_folder: Path, tmp_path: Path, scheduler: Scheduler
) -> AsyncIterator["Stub"]:
    folder = chat_folder
    settings = Settings.from_env(
        {"TDB_MODEL": f"chat={folder}", "TDB_DATA_DIR": str(tmp_path), "TDB_DRAIN_SECONDS": "1"}
    )
    models = {"chat": load_model(ModelSource("chat", str(folder)), None)}
    async with (
        build_server(settings, scheduler, models, port=0) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield service_pb2_grpc.InferenceServiceStub(channel)


async def test_a_chat_is_replayed_by_its_tokens(chatting: "Stub") -> None:
    messages = [{"role": "user", "content": "to the store"}]
    answer = await generated(chatting, run={"prompt": {"chat": {"messages": messages}}})
    canonical = json.loads(answer.summary.manifest.request_json)
    ids = canonical["run"]["prompt"]["tokenIds"]["ids"]
    rendered = await chatting.Tokenize(
        ParseDict({"prompt": {"tokenIds": {"ids": ids}}}, model_pb2.TokenizeRequest())
    )
    assert rendered.text == "user: to the store\ngave:"
    replay = Parse(answer.summary.manifest.request_json, generate_pb2.GenerateRequest())
    again = Answer([each async for each in chatting.Generate(replay)])
    assert again.tokens == answer.tokens
    unopened = await generated(
        chatting,
        run={"prompt": {"chat": {"messages": messages, "addGenerationPrompt": False}}},
    )
    assert len(unopened.summary.manifest.token_ids[0].ids) < len(
        answer.summary.manifest.token_ids[0].ids
    )


@pytest.mark.shared
async def test_a_real_model_gives_its_published_greedy_text(
    shared_data: Path, tmp_path: Path, scheduler: Scheduler
) -> None:
    folder = shared_data / "stories260k"
    expected = (folder / "EXPECTED-greedy-from-BOS.txt").read_text().rstrip()
    settings = Settings.from_env({"TDB_MODEL": f"stories={folder}", "TDB_DATA_DIR": str(tmp_path)})
    models = {"stories": load_model(ModelSource("stories", str(folder)), None)}
    async with (
        build_server(settings, scheduler, models, port=0) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub = service_pb2_grpc.InferenceServiceStub(channel)
        answer = await generated(
            stub,
            run={"prompt": {"tokenIds": {"ids": [1]}}},
            maxNewTokens=256,
            stop=[expected[-20:]],
            pastEnd=None,
        )
    assert answer.summary.continuations[0].text.lstrip(" ") == expected
    assert len(answer.tokens) > 100
