"""Evaluators: each takes a model and yields named numbers, the same for every number of ranks."""

from clipscale.evals.build import build_evaluators, damaged_shards
from clipscale.evals.classifier import ClassifierEvaluator
from clipscale.evals.examples import Examples
from clipscale.evals.protocol import EvalContext, Evaluator, Images
from clipscale.evals.retrieval import RetrievalEvaluator
from clipscale.evals.zeroshot import Classes, ZeroshotEvaluator

__all__ = [
    "Classes",
    "ClassifierEvaluator",
    "EvalContext",
    "Evaluator",
    "Examples",
    "Images",
    "RetrievalEvaluator",
    "ZeroshotEvaluator",
    "build_evaluators",
    "damaged_shards",
]
