"""What models are told, in one place: the words that decide what scores and explanations mean."""

_COMPONENT = (
    "We study one component (a neuron or a sparse feature) of a language model. For each token of "
    "a text it has an activation: 0 where it is silent, 10 at its strongest."
)
_HEAD = (
    "We study one attention head of a language model. At each token (the token it reads from) it "
    "looks at that token or at one before it (the token it looks at), and copies something over. "
)
_SENTENCE = (
    'Reply with {"explanation": "..."}: one phrase of at most 25 words that says what sets the '
    "component off, as specific as the data allow. Name tokens where it is about tokens, meaning "
    "where it is about meaning. Say nothing about the data or the activations themselves."
)

TOKEN_ACTIVATION_PAIRS = (
    f"{_COMPONENT} The data are texts as lists of [token, activation]. Find what the tokens with "
    f"high activations have in common that others have not: the token itself, what stands before "
    f"it, or what the text is about. {_SENTENCE}"
)
MAX_ACTIVATION_SUMMARY = (
    f"{_COMPONENT} The data are texts that activate it most, cut in pieces: an object with the key "
    f'"fires" is where it fires. "strongest" lists the tokens with the highest activations. '
    f"{_SENTENCE}"
)
CONTRASTIVE = (
    f'{_COMPONENT} "active" are texts that activate it, cut in pieces: an object with the key '
    f'"fires" is where it fires. "silent" are texts that do not, although they may look alike. '
    f"Say what the active texts have and the silent ones have not. {_SENTENCE}"
)
ATTENTION_HEAD = (
    f"{_HEAD}The data are texts in which it does so most strongly, cut in pieces: an object with "
    f'the key "from" is the token it reads from, "to" the token it looks at, "from_and_to" both at '
    'once. Reply with {"explanation": "..."}: one phrase of at most 25 words of the form "from ... '
    'to ...", as specific as the data allow.'
)
OUTPUT_CENTRED = (
    "We study one component of a language model. When it is active, the tokens in "
    '"promoted" become more likely to come next and those in "suppressed" less, by so many logits '
    'per unit of activation. Reply with {"explanation": "..."}: one phrase of at most 25 words '
    "that says what kind of text it makes the model say."
)

DETECT = (
    f"{_COMPONENT} An explanation says what it fires on. For each text in the data, judge by the "
    "explanation alone whether some token of it activates the component. Reply with "
    '{"answers": [{"id": 1, "grade": 0}, ...]}, one for each text: grade 0 is surely not, 10 '
    "surely."
)
FUZZ = (
    f"{_COMPONENT} An explanation says what it fires on. Each text in the data is cut in pieces, "
    'and objects with the key "marked" claim to be where it fires. Judge by the explanation alone '
    'whether the marks are right. Reply with {"answers": [{"id": 1, "grade": 0}, ...]}, one for '
    "each text: grade 0 is surely wrong, 10 surely right."
)
SIMULATE = (
    f"{_COMPONENT} An explanation says what it fires on. The data are the tokens of one text. "
    "Predict the activation at each token from the explanation and the text up to that token; most "
    'are 0. Reply with {"activations": [{"token": 1, "activation": 0}, ...]}, one for each token '
    "in order."
)
RELATE = (
    f"{_HEAD}An explanation says when. Each text in the data is cut in pieces: an object with the "
    'key "from" is the token it reads from, "to" the token it looks at, "from_and_to" both at '
    "once. Judge by the explanation alone whether the head looks strongly from one to the other. "
    'Reply with {"answers": [{"id": 1, "grade": 0}, ...]}, one for each text: grade 0 is surely '
    "not, 10 surely."
)
COMPARE = (
    "We study one component of a language model, and an explanation says what it does. The model "
    'went on with one text twice, and in one of the two, "first" or "second", the component was '
    'amplified. Judge by the explanation alone which. Reply with {"grade": 0}: 0 is surely the '
    "second, 5 no idea, 10 surely the first."
)
