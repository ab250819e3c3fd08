"""The three stages as flat recipes: settings in, files out."""

from pad.stages.distilling import distill
from pad.stages.evaluating import evaluate
from pad.stages.recording import record_experts

__all__ = ["distill", "evaluate", "record_experts"]
