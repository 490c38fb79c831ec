// Streams one chat answer: dotnet run -- [words ...]
using System;
using System.Linq;
using System.Net.Http;
using System.Net.Security;
using System.Security.Cryptography.X509Certificates;
using System.Threading;
using System.Threading.Tasks;
using Google.Rpc;
using Grpc.Core;
using Grpc.Net.Client;
using Treadle.Api.Inference.V1;

static string Setting(string name, string otherwise) =>
    Environment.GetEnvironmentVariable(name) is { Length: > 0 } value ? value : otherwise;

// TLS by the name that the suite's own programs use, and its keepalive.
static GrpcChannel Connect()
{
    var roots = Setting("TREADLE_TLS_CA", "");
    var handler = new SocketsHttpHandler
    {
        KeepAlivePingDelay = TimeSpan.FromSeconds(60),
        KeepAlivePingTimeout = TimeSpan.FromSeconds(20),
        KeepAlivePingPolicy = HttpKeepAlivePingPolicy.WithActiveRequests,
    };
    if (roots != "")
    {
        var policy = new X509ChainPolicy
        {
            TrustMode = X509ChainTrustMode.CustomRootTrust,
            RevocationMode = X509RevocationMode.NoCheck,
        };
        policy.CustomTrustStore.ImportFromPemFile(roots);
        handler.SslOptions = new SslClientAuthenticationOptions { CertificateChainPolicy = policy };
    }
    var scheme = roots == "" ? "http" : "https";
    return GrpcChannel.ForAddress(
        $"{scheme}://{Setting("TREADLE_ADDRESS", "127.0.0.1:50051")}",
        new GrpcChannelOptions { HttpHandler = handler, MaxReceiveMessageSize = 16 << 20 });
}

// The code, then the details that the suite sends along.
static void Explain(RpcException error)
{
    Console.Error.WriteLine($"{error.StatusCode}: {error.Status.Detail}");
    var status = error.GetRpcStatus();
    if (status?.GetDetail<ErrorInfo>() is { } info)
        Console.Error.WriteLine($"  reason {info.Reason}");
    foreach (var field in status?.GetDetail<BadRequest>()?.FieldViolations.ToArray() ?? [])
        Console.Error.WriteLine($"  {field.Field}: {field.Description}");
    if (status?.GetDetail<RetryInfo>() is { } retry)
        Console.Error.WriteLine($"  try again in {retry.RetryDelay.ToTimeSpan()}");
}

var question = args.Length == 0 ? "What is a loom? Answer in one sentence." : string.Join(' ', args);
var generation = new Generation
{
    Model = "smollm2",
    Chat = new Chat { Messages = { new ChatMessage { Role = "user", Content = question } } },
    Sampling = new SamplingParameters { Temperature = 0 },
    Stopping = new StoppingCriteria { MaxNewTokens = 64 },
};
var headers = new Metadata();
if (Setting("TREADLE_API_KEY", "") is { Length: > 0 } key)
    headers.Add("authorization", $"Bearer {key}");

using var channel = Connect();
using var call = new InferenceService.InferenceServiceClient(channel).GenerateStream(
    new GenerateStreamRequest { Generation = generation }, headers, DateTime.UtcNow.AddMinutes(1));
try
{
    await foreach (var response in call.ResponseStream.ReadAllAsync())
    {
        var chunk = response.Chunk;
        switch (chunk.ChunkCase)
        {
            case GenerateChunk.ChunkOneofCase.Started:
                Console.Error.WriteLine($"[{chunk.Started.ArtifactDigest}, {chunk.Started.PromptTokens} tokens read]");
                break;
            case GenerateChunk.ChunkOneofCase.Tokens:
                Console.Write(chunk.Tokens.Text);
                break;
            case GenerateChunk.ChunkOneofCase.Finished:
                Console.WriteLine($"\n{chunk.Finished.Choices[0].FinishReason}, {chunk.Finished.Usage.OutputTokens} tokens made");
                break;
        }
    }
    return 0;
}
catch (RpcException error)
{
    Explain(error);
    return 1;
}
