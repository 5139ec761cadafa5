"""The Slurm job that this process belongs to."""

import os
import subprocess
from collections.abc import Mapping


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """The job as `scontrol` names it, a task of an array as ARRAY_TASK; None outside Slurm."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")


def requeue() -> str | None:
    """Puts the job back into the queue; a line that says so, or why it failed, and None outside Slurm."""
    job = job_id()
    if job is None:
        return None
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} is not requeued: scontrol cannot be run ({error})"
    if done.returncode:
        return f"job {job} is not requeued: {' '.join(done.stderr.split()) or f'scontrol ended with {done.returncode}'}"
    return f"job {job} is requeued; its script resumes with ${{SLURM_RESTART_COUNT:+--resume latest}}"
