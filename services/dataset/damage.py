"""What is wrong with a file of a dataset, and for which component it matters."""

from services.common.errors import FailedPrecondition


class Damaged(FailedPrecondition):
    """Raised for one record, or for everything of a shard (`component` is empty)."""

    default_reason = "DAMAGED"

    def __init__(self, file: str, what: str, component: str = "") -> None:
        whose = f"the record of {component} in " if component else ""
        super().__init__(
            f"{whose}{file} {what}; build or import the dataset again to replace it",
            metadata={"file": file, "component": component},
        )
        self.file = file
        self.what = what
        self.component = component

    def of(self, component: str) -> "Damaged":
        """The same damage, as far as it concerns `component`."""
        return Damaged(self.file, self.what, component)
