import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.ChannelCredentials;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.io.File;
import java.io.IOException;
import java.util.Iterator;
import java.util.concurrent.TimeUnit;
import treadle.api.inference.v1.GenerationOuterClass;
import treadle.api.inference.v1.GenerationOuterClass.ChatMessage;
import treadle.api.inference.v1.GenerationOuterClass.GenerateChunk;
import treadle.api.inference.v1.GenerationOuterClass.Generation;
import treadle.api.inference.v1.GenerationOuterClass.SamplingParameters;
import treadle.api.inference.v1.GenerationOuterClass.StoppingCriteria;
import treadle.api.inference.v1.Inference.GenerateStreamRequest;
import treadle.api.inference.v1.Inference.GenerateStreamResponse;
import treadle.api.inference.v1.InferenceServiceGrpc;
import treadle.api.inference.v1.InferenceServiceGrpc.InferenceServiceBlockingStub;

/** Streams one chat answer: java Chat [words ...] */
public class Chat {
  private static String setting(String name, String otherwise) {
    String value = System.getenv(name);
    return value == null || value.isEmpty() ? otherwise : value;
  }

  /** TLS by the name that the suite's own programs use, and its keepalive. */
  private static ManagedChannel connect() throws IOException {
    String roots = setting("TREADLE_TLS_CA", "");
    ChannelCredentials transport =
        roots.isEmpty()
            ? InsecureChannelCredentials.create()
            : TlsChannelCredentials.newBuilder().trustManager(new File(roots)).build();
    return Grpc.newChannelBuilder(setting("TREADLE_ADDRESS", "127.0.0.1:50051"), transport)
        .keepAliveTime(60, TimeUnit.SECONDS)
        .keepAliveTimeout(20, TimeUnit.SECONDS)
        .maxInboundMessageSize(16 << 20)
        .build();
  }

  /** Every call has a minute, and shows the key where there is one. */
  private static InferenceServiceBlockingStub stub(ManagedChannel channel) {
    InferenceServiceBlockingStub stub = InferenceServiceGrpc.newBlockingStub(channel);
    String key = setting("TREADLE_API_KEY", "");
    if (!key.isEmpty()) {
      Metadata headers = new Metadata();
      headers.put(Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + key);
      stub = stub.withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers));
    }
    return stub.withDeadlineAfter(60, TimeUnit.SECONDS);
  }

  private static Generation generation(String question) {
    return Generation.newBuilder()
        .setModel("smollm2")
        .setChat(
            GenerationOuterClass.Chat.newBuilder()
                .addMessages(ChatMessage.newBuilder().setRole("user").setContent(question)))
        .setSampling(SamplingParameters.newBuilder().setTemperature(0))
        .setStopping(StoppingCriteria.newBuilder().setMaxNewTokens(64))
        .build();
  }

  private static void print(GenerateChunk chunk) {
    switch (chunk.getChunkCase()) {
      case STARTED:
        System.err.printf(
            "[%s, %d tokens read]%n",
            chunk.getStarted().getArtifactDigest(), chunk.getStarted().getPromptTokens());
        break;
      case TOKENS:
        System.out.print(chunk.getTokens().getText());
        System.out.flush();
        break;
      case FINISHED:
        System.out.printf(
            "%n%s, %d tokens made%n",
            chunk.getFinished().getChoices(0).getFinishReason(),
            chunk.getFinished().getUsage().getOutputTokens());
        break;
      default:
        break;
    }
  }

  /** The code, then the details that the suite sends along. */
  private static void explain(StatusRuntimeException error) throws InvalidProtocolBufferException {
    System.err.println(error.getStatus().getCode() + ": " + error.getStatus().getDescription());
    com.google.rpc.Status status = StatusProto.fromThrowable(error);
    for (com.google.protobuf.Any detail : status.getDetailsList()) {
      if (detail.is(ErrorInfo.class)) {
        System.err.println("  reason " + detail.unpack(ErrorInfo.class).getReason());
      } else if (detail.is(BadRequest.class)) {
        for (BadRequest.FieldViolation field : detail.unpack(BadRequest.class).getFieldViolationsList()) {
          System.err.println("  " + field.getField() + ": " + field.getDescription());
        }
      } else if (detail.is(RetryInfo.class)) {
        com.google.protobuf.Duration delay = detail.unpack(RetryInfo.class).getRetryDelay();
        System.err.println("  try again in " + (delay.getSeconds() + delay.getNanos() / 1e9) + " s");
      }
    }
  }

  public static void main(String[] words) throws Exception {
    String question = words.length == 0 ? "What is a loom? Answer in one sentence." : String.join(" ", words);
    ManagedChannel channel = connect();
    try {
      GenerateStreamRequest request =
          GenerateStreamRequest.newBuilder().setGeneration(generation(question)).build();
      Iterator<GenerateStreamResponse> answer = stub(channel).generateStream(request);
      while (answer.hasNext()) {
        print(answer.next().getChunk());
      }
    } catch (StatusRuntimeException error) {
      explain(error);
      System.exit(1);
    } finally {
      channel.shutdownNow().awaitTermination(5, TimeUnit.SECONDS);
    }
  }
}
