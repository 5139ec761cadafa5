"""Lightning callbacks, independent of t2i_lm: they know modules by their step outputs alone."""

from callbacks.base.contract import SplitLossModule, StepOutput, record_head
from callbacks.checkpoints import RunCheckpoints, find_resumable
from callbacks.coco_fid import CocoFID, FidTask
from callbacks.dashboard import Dashboard
from callbacks.files.checkpoint_io import CorruptCheckpointError, DurableCheckpointIO
from callbacks.files.checkpoint_parts import read_checkpoint
from callbacks.files.event_log import EventLog
from callbacks.files.metrics_file import MetricsFile
from callbacks.forgetting import Forgetting
from callbacks.metrics.frechet import FeatureDistance, frechet_distance, kernel_distance
from callbacks.metrics.inception import Inception
from callbacks.nonfinite_guard import NonFiniteGuard
from callbacks.perplexity import EMASplitPerplexity, split_entries
from callbacks.preemption import Preempted, Preemption
from callbacks.progress import RunProgress
from callbacks.rank_progress import BatchReading, RankProgress
from callbacks.rng_state import RngState
from callbacks.run_record import RunRecord, read_record
from callbacks.sample_grid import SampleBatch, SampleGrid
from callbacks.scalars import RunScalars
from callbacks.throughput import Throughput
from callbacks.wall_time import WallTime

__all__ = [
    "BatchReading",
    "CocoFID",
    "CorruptCheckpointError",
    "Dashboard",
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
    "RankProgress",
    "RngState",
    "RunCheckpoints",
    "RunProgress",
    "RunRecord",
    "RunScalars",
    "SampleBatch",
    "SampleGrid",
    "SplitLossModule",
    "StepOutput",
    "Throughput",
    "WallTime",
    "find_resumable",
    "frechet_distance",
    "kernel_distance",
    "read_checkpoint",
    "read_record",
    "record_head",
    "split_entries",
]
