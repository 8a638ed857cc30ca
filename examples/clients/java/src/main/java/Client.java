import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.util.Durations;
import com.google.protobuf.util.JsonFormat;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RequestInfo;
import com.google.rpc.RetryInfo;
import huaweicloud.rds.task.v1.GetTaskDetailRequest;
import huaweicloud.rds.task.v1.GetTaskDetailResponse;
import huaweicloud.rds.task.v1.TaskServiceGrpc;
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
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;

/** Looks up one task. Prints the reply or, if the call fails, its code, message, reason, retry delay and request id. */
public final class Client {
    // The facade already retries RDS. One retry here covers an instance of the facade that stops during the call.
    // [retry]
    private static final Map<String, ?> SERVICE_CONFIG = Map.of(
            "methodConfig", List.of(Map.of(
                    "name", List.of(Map.of("service", "huaweicloud.rds.task.v1.TaskService", "method", "GetTaskDetail")),
                    "retryPolicy", Map.of(
                            "maxAttempts", 2.0,
                            "initialBackoff", "0.2s",
                            "maxBackoff", "2s",
                            "backoffMultiplier", 2.0,
                            "retryableStatusCodes", List.of("UNAVAILABLE")))));
    // [/retry]

    private static final Metadata.Key<String> TOKEN =
            Metadata.Key.of("x-auth-token", Metadata.ASCII_STRING_MARSHALLER);

    public static void main(String[] arguments) throws IOException {
        Map<String, String> options = parseOptions(arguments);
        ManagedChannel channel = openChannel(options.get("--target"), options.get("--ca"));
        try {
            System.out.println(JsonFormat.printer().preservingProtoFieldNames().print(getTaskDetail(channel, options)));
        } catch (StatusRuntimeException exception) {
            printError(exception);
            System.exit(1);
        } finally {
            channel.shutdownNow();
        }
    }

    private static Map<String, String> parseOptions(String[] arguments) {
        Map<String, String> options = new HashMap<>(Map.of(
                "--target", "127.0.0.1:50051", // address of the facade, HOST:PORT
                "--ca", "", // PEM file of trusted certificates; plaintext if not set
                "--token", "", // RDS token of the caller, needed if the facade runs with --credentials caller
                "--project-id", "0483b6b16e954cb88930a360d2c4e663", // project that owns the instance
                "--instance-id", "1ffc4167903840cb93a3da56d28c14fdin01", // database instance
                "--workflow-id", "102772a9-31fa-4129-b9f8-7638e2792f3b", // task
                "--timeout", "10")); // deadline of the call, in seconds
        for (int index = 0; index < arguments.length; index += 2) {
            if (index + 1 == arguments.length || options.replace(arguments[index], arguments[index + 1]) == null) {
                System.err.println("usage: --NAME VALUE, where --NAME is one of " + options.keySet());
                System.exit(2);
            }
        }
        return options;
    }

    // [connection]
    private static ManagedChannel openChannel(String target, String ca) throws IOException {
        ChannelCredentials credentials = ca.isEmpty()
                ? InsecureChannelCredentials.create()
                : TlsChannelCredentials.newBuilder().trustManager(new File(ca)).build();
        return Grpc.newChannelBuilder(target, credentials)
                .defaultServiceConfig(SERVICE_CONFIG)
                .enableRetry()
                .build();
    }
    // [/connection]

    // [call]
    private static GetTaskDetailResponse getTaskDetail(ManagedChannel channel, Map<String, String> options) {
        Metadata metadata = new Metadata();
        if (!options.get("--token").isEmpty()) {
            metadata.put(TOKEN, options.get("--token"));
        }
        long milliseconds = (long) (Double.parseDouble(options.get("--timeout")) * 1000);
        return TaskServiceGrpc.newBlockingStub(channel)
                .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(metadata))
                .withDeadlineAfter(milliseconds, TimeUnit.MILLISECONDS)
                .getTaskDetail(GetTaskDetailRequest.newBuilder()
                        .setProjectId(options.get("--project-id"))
                        .setInstanceId(options.get("--instance-id"))
                        .setWorkflowId(options.get("--workflow-id"))
                        .build());
    }
    // [/call]

    // [error]
    private static void printError(StatusRuntimeException exception) throws InvalidProtocolBufferException {
        System.err.println(exception.getStatus().getCode() + ": " + exception.getStatus().getDescription());
        for (Any detail : StatusProto.fromThrowable(exception).getDetailsList()) {
            if (detail.is(ErrorInfo.class)) {
                System.err.println("reason: " + detail.unpack(ErrorInfo.class).getReason());
            } else if (detail.is(RetryInfo.class)) {
                double seconds = Durations.toSecondsAsDouble(detail.unpack(RetryInfo.class).getRetryDelay());
                System.err.println("retry after: " + seconds + " s");
            } else if (detail.is(RequestInfo.class)) {
                System.err.println("request id: " + detail.unpack(RequestInfo.class).getRequestId());
            }
        }
    }
    // [/error]
}
