"""Whether a component is worth an explanation at all, before anything is spent on it."""

from dataclasses import dataclass

from services.common.addresses import Kind
from services.explainer.components import Subject
from services.explainer.job_run import Skipped

NEVER_ACTIVE, TOO_DENSE = "NEVER_ACTIVE", "TOO_DENSE"
PATTERN_AUC_TOO_LOW, ALREADY_EXPLAINED = "PATTERN_AUC_TOO_LOW", "ALREADY_EXPLAINED"
NOT_WORTH_IT = ("TOO_FEW_DOCUMENTS", "NO_READ_OUTS")
"""Reasons of the engine for which a component is skipped: nothing has failed."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """`max_fraction_active` is a share of the corpus, for neurons and latents; `min_pattern_auc`
    what the offline token pattern must reach, None: it is not asked."""

    max_fraction_active: float = 0.5
    min_pattern_auc: float | None = None

    def check(self, subject: Subject) -> None:
        """Raises Skipped for what the record alone says."""
        active = subject.fraction_active
        if subject.component.scale <= 0 or active == 0:
            raise Skipped(NEVER_ACTIVE)
        dense = active is not None and active > self.max_fraction_active
        if dense and subject.component.kind is not Kind.HEAD:
            raise Skipped(TOO_DENSE)
