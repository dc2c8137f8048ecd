"""What is wrong with a file of a dataset, and for which component it matters."""

from services.common.errors import FailedPrecondition

_REMEDY = "build or import the dataset again to replace it"


class Damaged(FailedPrecondition):
    """Raised for one record, or for everything of a shard (`component` is empty)."""

    default_reason = "DAMAGED"

    def __init__(
        self, file: str, what: str, component: str = "", remedy: str = _REMEDY, *, said: str = ""
    ) -> None:
        """`said` is the whole sentence, where another is needed."""
        whose = f"the record of {component} in " if component else ""
        super().__init__(
            said or f"{whose}{file} {what}; {remedy}",
            metadata={"file": file, "component": component},
        )
        self.file = file
        self.what = what
        self.component = component

    def of(self, component: str) -> "Damaged":
        """The same damage, as far as it concerns `component`."""
        return Damaged(self.file, self.what, component)
