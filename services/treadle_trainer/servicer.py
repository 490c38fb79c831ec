"""The training contract, for as long as there is no code behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from treadle.api.training.v1 import training_pb2 as pb
from treadle.api.training.v1 import training_pb2_grpc
from treadle.errors import Unimplemented

SERVICE = "treadle.api.training.v1.TrainingService"

Context = grpc.aio.ServicerContext[Any, Any]


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """Every call ends as UNIMPLEMENTED, reason TRAINING_UNIMPLEMENTED."""

    async def CreateJob(self, request: pb.CreateJobRequest, context: Context) -> pb.CreateJobResponse:  # noqa: N802
        """Not yet."""
        raise _not_yet("CreateJob")

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:  # noqa: N802
        """Not yet."""
        raise _not_yet("GetJob")

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:  # noqa: N802
        """Not yet."""
        raise _not_yet("ListJobs")

    async def CancelJob(self, request: pb.CancelJobRequest, context: Context) -> pb.CancelJobResponse:  # noqa: N802
        """Not yet."""
        raise _not_yet("CancelJob")

    async def PauseJob(self, request: pb.PauseJobRequest, context: Context) -> pb.PauseJobResponse:  # noqa: N802
        """Not yet."""
        raise _not_yet("PauseJob")

    async def ResumeJob(self, request: pb.ResumeJobRequest, context: Context) -> pb.ResumeJobResponse:  # noqa: N802
        """Not yet."""
        raise _not_yet("ResumeJob")

    async def SetJobPriority(  # noqa: N802
        self, request: pb.SetJobPriorityRequest, context: Context
    ) -> pb.SetJobPriorityResponse:
        """Not yet."""
        raise _not_yet("SetJobPriority")

    async def CheckpointJob(  # noqa: N802
        self, request: pb.CheckpointJobRequest, context: Context
    ) -> pb.CheckpointJobResponse:
        """Not yet."""
        raise _not_yet("CheckpointJob")

    def WatchJob(  # noqa: N802
        self, request: pb.WatchJobRequest, context: Context
    ) -> AsyncIterator[pb.WatchJobResponse]:
        """Not yet."""
        raise _not_yet("WatchJob")


def _not_yet(method: str) -> Unimplemented:
    return Unimplemented(
        f"{method} is in the contract, but this version has no code for training yet",
        reason="TRAINING_UNIMPLEMENTED",
    )
