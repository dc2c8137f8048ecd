"""The list of metrics in docs/operations.md, from the metrics themselves.

`python -m tools.metrics_page` writes it anew; with `--check` it only says whether that is due.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from gateway.metrics import GatewayMetrics
from services.common.cache.memory import MemoryCache
from services.common.cache.metrics import CacheMetrics
from services.common.metrics import CallMetrics
from services.inference.metrics import DeviceMetrics

PAGE = Path(__file__).parents[1] / "docs" / "operations.md"
BEGIN = "<!-- Written by `python -m tools.metrics_page`: begin -->\n"
END = "<!-- end -->\n"


def groups() -> dict[str, CollectorRegistry]:
    """Every metric of ours, by who has it."""
    found = {name: CollectorRegistry() for name in ("every service", "inference", "gateway")}
    CallMetrics(found["every service"])
    DeviceMetrics(found["inference"])
    found["inference"].register(CacheMetrics(MemoryCache(0), lambda: 0))
    GatewayMetrics(found["gateway"])
    return found


def as_table() -> str:
    lines = ["| metric | of | kind | labels | |", "|---|---|---|---|---|"]
    for owner, registry in groups().items():
        for name, kind, labels, meaning in described(registry):
            shown = ", ".join(f"`{label}`" for label in labels)
            lines.append(f"| `{name}` | {owner} | {kind} | {shown} | {meaning} |")
    return "\n".join(lines) + "\n"


def described(registry: CollectorRegistry) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """(name as Prometheus has it, kind, labels, meaning)."""
    for collector in list(registry._collector_to_names):
        for family in collector.collect():
            # A metric knows its labels before it has any sample; a family made ad hoc itself.
            of: Any = collector if hasattr(collector, "_labelnames") else family
            name = f"{family.name}_total" if family.type == "counter" else family.name
            yield name, family.type, tuple(of._labelnames), family.documentation


def with_table(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + as_table() + "\n" + END + after


def main() -> int:
    page = PAGE.read_text()
    if BEGIN not in page or END not in page:
        print(f"{PAGE} has no place for the list of metrics")
        return 1
    if "--check" not in sys.argv:
        PAGE.write_text(with_table(page))
    elif page != with_table(page):
        print(f"{PAGE} is behind: run python -m tools.metrics_page")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
