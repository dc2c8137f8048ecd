"""docs/families.md, written from the registry that the tests of all families iterate.

`python -m services.inference.families_page` writes it anew; with `--check` it only says whether
that is due.
"""

import sys
from pathlib import Path

from services.inference.engine.families import EXPERT_FEATURES, FAMILIES, FEATURES, Family

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

_HEAD = """\
# Families

Models of these families are served: `model_type` is what their `config.json` says. Others are
refused at load with the reason, before weights are read where the configuration says enough.

<!-- Written by `python -m services.inference.families_page`; edit engine/families.py. -->
"""


_NODES = {
    False: "head pairs, neurons",
    True: "head pairs; whole MLPs where they are mixtures of experts, neurons elsewhere",
}


def _proofs(family: Family) -> str:
    proved = EXPERT_FEATURES if family.experts else tuple(FEATURES)
    return " | ".join("yes" if feature in proved else "-" for feature in FEATURES)


def as_page() -> str:
    """The text of docs/families.md."""
    shapes = [
        f"| {family.title} | `{model_type}` | {variant} | {peculiar} | {_NODES[family.experts]} |"
        for model_type, family in FAMILIES.items()
        for variant, peculiar in family.variants.items()
    ]
    proofs = [
        f"| {family.title}, {variant} | {_proofs(family)} |"
        for family in FAMILIES.values()
        for variant in family.variants
    ]
    return "\n".join(
        [
            _HEAD,
            "| family | model_type | variant | what is peculiar | finest nodes |",
            "|---|---|---|---|---|",
            *shapes,
            "",
            "## What is proved of each",
            "",
            "`tests/inference/families` runs one test per feature on a tiny model of every "
            "variant, all weights random.",
            "",
            *(f"- **{feature}**: {meaning}." for feature, meaning in FEATURES.items()),
            "",
            "| | " + " | ".join(FEATURES) + " |",
            "|---|" + "---|" * len(FEATURES),
            *proofs,
            "",
        ]
    )


def main() -> int:
    if "--check" not in sys.argv:
        PAGE.write_text(as_page())
    elif PAGE.read_text() != as_page():
        print(f"{PAGE} is behind: run python -m services.inference.families_page")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
