"""Lightning callbacks of the suite: a leaf package that knows modules only by their step outputs."""

from callbacks.checkpoint_io import CorruptCheckpointError, DurableCheckpointIO
from callbacks.checkpoints import RunCheckpoints, find_resumable
from callbacks.contract import SplitLossModule, StepOutput, record_head
from callbacks.events import EventLog
from callbacks.fid import CocoFID, FidTask
from callbacks.forgetting import Forgetting
from callbacks.frechet import FeatureDistance, frechet_distance, kernel_distance
from callbacks.inception import Inception
from callbacks.metrics_file import MetricsFile
from callbacks.nan_guard import NonFiniteGuard
from callbacks.perplexity import EMASplitPerplexity
from callbacks.preemption import Preempted, Preemption
from callbacks.progress import RunProgress
from callbacks.rng import RngState
from callbacks.samples import Drawn, SampleGrid
from callbacks.scalars import RunScalars
from callbacks.throughput import Throughput
from callbacks.wall_time import WallTime

__all__ = [
    "CocoFID",
    "CorruptCheckpointError",
    "Drawn",
    "DurableCheckpointIO",
    "EMASplitPerplexity",
    "EventLog",
    "FeatureDistance",
    "FidTask",
    "Forgetting",
    "Inception",
    "MetricsFile",
    "NonFiniteGuard",
    "Preempted",
    "Preemption",
    "RngState",
    "RunCheckpoints",
    "RunProgress",
    "RunScalars",
    "SampleGrid",
    "SplitLossModule",
    "StepOutput",
    "Throughput",
    "WallTime",
    "find_resumable",
    "frechet_distance",
    "kernel_distance",
    "record_head",
]
