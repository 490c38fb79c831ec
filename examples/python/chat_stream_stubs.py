"""The same with the generated stubs alone, as any language does it: python chat_stream_stubs.py [host:port]

Needs grpcio and the stubs of protos/treadle/api/inference/v1, nothing else of the suite.
"""

import sys

import grpc

from treadle.api.inference.v1 import generation_pb2, inference_pb2, inference_pb2_grpc

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
generation = generation_pb2.Generation(
    model="smollm2",
    chat={"messages": [{"role": "user", "content": "What is a loom? Answer in one sentence."}]},
    sampling={"temperature": 0.0},
    stopping={"max_new_tokens": 60},
)

with grpc.insecure_channel(address) as channel:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    for response in stub.GenerateStream(
        inference_pb2.GenerateStreamRequest(generation=generation), timeout=60
    ):
        kind = response.chunk.WhichOneof("chunk")
        if kind == "started":
            print(f"[{response.chunk.started.artifact_digest}]", file=sys.stderr)
        elif kind == "tokens":
            print(response.chunk.tokens.text, end="", flush=True)
        else:
            reason = response.chunk.finished.choices[0].finish_reason
            print(f"\n{generation_pb2.FinishReason.Name(reason)}")
