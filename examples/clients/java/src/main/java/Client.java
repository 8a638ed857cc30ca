import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.protobuf.util.Durations;
import com.google.protobuf.util.JsonFormat;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RequestInfo;
import com.google.rpc.RetryInfo;
import huaweicloud.rds.task.v1.GetTaskDetailRequest;
import huaweicloud.rds.task.v1.GetTaskDetailResponse;
import huaweicloud.rds.task.v1.TaskServiceGrpc;
import huaweicloud.rds.task.v1.TaskState;
import huaweicloud.rds.task.v1.WatchTaskDetailRequest;
import huaweicloud.rds.task.v1.WatchTaskDetailResponse;
import io.grpc.ChannelCredentials;
import io.grpc.Deadline;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.io.File;
import java.io.IOException;
import java.util.EnumSet;
import java.util.HashMap;
import java.util.Iterator;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;

/**
 * Looks up one task, or watches it until it is over. Prints the reply or each state; for an error, its code, message, reason, retry
 * delay and request id.
 */
public final class Client {
    // The facade already retries RDS. One retry here covers an instance of the facade that stops during the call.
    private static final Map<String, ?> SERVICE_CONFIG = Map.of(
            "methodConfig", List.of(Map.of(
                    "name", List.of(Map.of("service", "huaweicloud.rds.task.v1.TaskService", "method", "GetTaskDetail")),
                    "timeout", "30s",
                    "retryPolicy", Map.of(
                            "maxAttempts", 2.0,
                            "initialBackoff", "0.2s",
                            "maxBackoff", "2s",
                            "backoffMultiplier", 2.0,
                            "retryableStatusCodes", List.of("UNAVAILABLE")))));

    private static final Metadata.Key<String> TOKEN =
            Metadata.Key.of("x-auth-token", Metadata.ASCII_STRING_MARSHALLER);

    private static final String USAGE = """
            usage: java -jar target/client.jar [watch] [--NAME VALUE]...
            Looks up one task, or watches it until it is over.
              --target       address of the facade, HOST:PORT
              --ca           PEM file of trusted certificates; plaintext if not set
              --cert         PEM file of the client's certificate, for a facade with --tls-client-ca
              --key          PEM file of the certificate's key, in PKCS #8 ("BEGIN PRIVATE KEY")
              --token        RDS token of the caller, needed if the facade runs with --credentials caller
              --project-id   project that owns the instance
              --instance-id  database instance
              --workflow-id  task
              --timeout      deadline of the call or of the whole watch, in seconds""";

    public static void main(String[] arguments) throws IOException, InterruptedException {
        // The word `watch` comes before the options.
        boolean watches = arguments.length > 0 && arguments[0].equals("watch");
        Map<String, String> options = parseOptions(arguments, watches);
        ManagedChannel channel = openChannel(options);
        try {
            if (watches) {
                System.exit(watch(channel, options));
            }
            System.out.println(JsonFormat.printer().preservingProtoFieldNames().print(getTaskDetail(channel, options)));
        } catch (StatusRuntimeException exception) {
            printError(exception);
            System.exit(1);
        } finally {
            channel.shutdownNow();
        }
    }

    private static Map<String, String> parseOptions(String[] arguments, boolean watches) {
        if (List.of(arguments).contains("--help")) {
            System.out.println(USAGE);
            System.exit(0);
        }
        Map<String, String> options = new HashMap<>(Map.of(
                "--target", "127.0.0.1:50051",
                "--ca", "",
                "--cert", "",
                "--key", "",
                "--token", "",
                "--project-id", "0483b6b16e954cb88930a360d2c4e663",
                "--instance-id", watches ? "lifecycle-20" : "1ffc4167903840cb93a3da56d28c14fdin01",
                "--workflow-id", "102772a9-31fa-4129-b9f8-7638e2792f3b",
                "--timeout", watches ? "3600" : "10"));
        for (int index = watches ? 1 : 0; index < arguments.length; index += 2) {
            if (index + 1 == arguments.length || options.replace(arguments[index], arguments[index + 1]) == null) {
                System.err.println(USAGE);
                System.exit(2);
            }
        }
        boolean hasCertificate = !options.get("--cert").isEmpty();
        if (hasCertificate == options.get("--key").isEmpty() || hasCertificate && options.get("--ca").isEmpty()) {
            System.err.println("--cert and --key need each other and --ca");
            System.exit(2);
        }
        return options;
    }

    private static ManagedChannel openChannel(Map<String, String> options) throws IOException {
        ChannelCredentials credentials = InsecureChannelCredentials.create();
        if (!options.get("--ca").isEmpty()) {
            TlsChannelCredentials.Builder tls = TlsChannelCredentials.newBuilder().trustManager(new File(options.get("--ca")));
            if (!options.get("--cert").isEmpty()) {
                tls.keyManager(new File(options.get("--cert")), new File(options.get("--key")));
            }
            credentials = tls.build();
        }
        return Grpc.newChannelBuilder(options.get("--target"), credentials)
                .defaultServiceConfig(SERVICE_CONFIG)
                .enableRetry()
                // PINGs detect a lost connection, on which a watch would wait for its deadline.
                .keepAliveTime(60, TimeUnit.SECONDS)
                .keepAliveTimeout(20, TimeUnit.SECONDS)
                .build();
    }

    private static GetTaskDetailResponse getTaskDetail(ManagedChannel channel, Map<String, String> options) {
        return newStub(channel, options)
                .withDeadline(deadline(options))
                .getTaskDetail(GetTaskDetailRequest.newBuilder()
                        .setProjectId(options.get("--project-id"))
                        .setInstanceId(options.get("--instance-id"))
                        .setWorkflowId(options.get("--workflow-id"))
                        .build());
    }

    private static TaskServiceGrpc.TaskServiceBlockingStub newStub(ManagedChannel channel, Map<String, String> options) {
        Metadata metadata = new Metadata();
        if (!options.get("--token").isEmpty()) {
            metadata.put(TOKEN, options.get("--token"));
        }
        return TaskServiceGrpc.newBlockingStub(channel)
                .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(metadata));
    }

    private static Deadline deadline(Map<String, String> options) {
        return Deadline.after((long) (Double.parseDouble(options.get("--timeout")) * 1000), TimeUnit.MILLISECONDS);
    }

    private static final Set<Status.Code> TRANSIENT = EnumSet.of(
            Status.Code.UNAVAILABLE,
            Status.Code.RESOURCE_EXHAUSTED,
            Status.Code.ABORTED,
            Status.Code.DEADLINE_EXCEEDED,
            Status.Code.CANCELLED);

    /** Returns the exit code: 0 succeeded, 3 failed or canceled, 4 the time is over, 1 the call failed. */
    private static int watch(ManagedChannel channel, Map<String, String> options)
            throws InterruptedException, InvalidProtocolBufferException {
        WatchTaskDetailRequest.Builder request = WatchTaskDetailRequest.newBuilder()
                .setProjectId(options.get("--project-id"))
                .setInstanceId(options.get("--instance-id"))
                .setWorkflowId(options.get("--workflow-id"));
        Deadline deadline = deadline(options);
        TaskServiceGrpc.TaskServiceBlockingStub stub = newStub(channel, options).withDeadline(deadline);
        TaskState state = TaskState.TASK_STATE_UNSPECIFIED;
        double pause = 1;
        while (true) {
            double delay;
            try {
                Iterator<WatchTaskDetailResponse> messages = stub.watchTaskDetail(request.build());
                while (messages.hasNext()) {
                    WatchTaskDetailResponse message = messages.next();
                    pause = 1;
                    if (message.hasTask()) {
                        // The final state comes again if the connection was lost after it.
                        if (!message.getEtag().equals(request.getEtag())) {
                            printState(message.getTask());
                        }
                        state = message.getTask().getState();
                    }
                    request.setEtag(message.getEtag());
                }
                return state == TaskState.TASK_STATE_SUCCEEDED ? 0 : 3;
            } catch (StatusRuntimeException exception) {
                printError(exception);
                if (!isTransient(exception)) {
                    return 1;
                }
                double jitter = ThreadLocalRandom.current().nextDouble(0.8, 1.2);
                delay = Math.max(pause * jitter, retryDelay(exception));
                pause = Math.min(pause * 1.6, 30);
            }
            long milliseconds = (long) (delay * 1000);
            if (milliseconds >= deadline.timeRemaining(TimeUnit.MILLISECONDS)) {
                return 4;
            }
            Thread.sleep(milliseconds);
        }
    }

    private static boolean isTransient(StatusRuntimeException exception) throws InvalidProtocolBufferException {
        Status.Code code = exception.getStatus().getCode();
        String reason = detail(exception, ErrorInfo.getDefaultInstance()).getReason();
        // Without a reason, these codes come from a proxy or a lost connection.
        if (code == Status.Code.INTERNAL || code == Status.Code.UNKNOWN) {
            return reason.isEmpty();
        }
        return TRANSIENT.contains(code) && !reason.equals("QUOTA_EXHAUSTED");
    }

    private static void printState(GetTaskDetailResponse task) {
        System.out.println(task.getState() + (task.hasProgressPercent() ? " " + task.getProgressPercent() + "%" : ""));
    }

    private static void printError(StatusRuntimeException exception) throws InvalidProtocolBufferException {
        System.err.println(exception.getStatus().getCode() + ": " + exception.getStatus().getDescription());
        String reason = detail(exception, ErrorInfo.getDefaultInstance()).getReason();
        if (!reason.isEmpty()) {
            System.err.println("reason: " + reason);
        }
        double delay = retryDelay(exception);
        if (delay > 0) {
            System.err.println("retry after: " + delay + " s");
        }
        String requestId = detail(exception, RequestInfo.getDefaultInstance()).getRequestId();
        if (!requestId.isEmpty()) {
            System.err.println("request id: " + requestId);
        }
    }

    private static double retryDelay(StatusRuntimeException exception) throws InvalidProtocolBufferException {
        return Durations.toSecondsAsDouble(detail(exception, RetryInfo.getDefaultInstance()).getRetryDelay());
    }

    /** Returns the error's detail of this type; the empty message if there is none. */
    private static <T extends Message> T detail(StatusRuntimeException exception, T empty)
            throws InvalidProtocolBufferException {
        for (Any detail : StatusProto.fromThrowable(exception).getDetailsList()) {
            if (detail.isSameTypeAs(empty)) {
                return detail.unpackSameTypeAs(empty);
            }
        }
        return empty;
    }
}
