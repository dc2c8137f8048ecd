"""What is wrong with a file of a dataset, and for which component it matters."""

from pathlib import Path

from services.common.errors import FailedPrecondition


class Damaged(FailedPrecondition):
    """Raised for one record, or for everything of a shard (`component` is empty)."""

    default_reason = "DAMAGED"

    def __init__(self, path: Path, what: str, component: str = "") -> None:
        whose = f"the record of {component} in " if component else ""
        super().__init__(
            f"{whose}{path.name} {what}; build or import the dataset again to replace it",
            metadata={"file": path.name, "component": component},
        )
        self.path = path
        self.what = what
        self.component = component

    def of(self, component: str) -> "Damaged":
        """The same damage, as far as it concerns `component`."""
        return Damaged(self.path, self.what, component)
