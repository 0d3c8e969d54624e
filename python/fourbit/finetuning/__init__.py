"""Fine-tuning: options, the run, its record, its trainer, its paging and its loss curve.

``run`` holds `finetune`; ``trainer`` is the only module that imports TRL, and is imported when a
run starts.
"""

from fourbit.finetuning.options import FinetuneOptions
from fourbit.finetuning.run import FinetuneReport, FinetuneStoppedError, finetune

__all__ = ["FinetuneOptions", "FinetuneReport", "FinetuneStoppedError", "finetune"]
