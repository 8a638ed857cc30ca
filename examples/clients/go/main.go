// Looks up one task, or watches it until it is over. Prints the reply or each state; for an error, its code, message, reason, retry
// delay and request id.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	taskv1 "rds-task-facade/examples/clients/go/gen/huaweicloud/rds/task/v1"
)

//go:generate buf generate

// The facade already retries RDS. One retry here covers an instance of the facade that stops during the call.
// [retry]
const serviceConfig = `{
  "methodConfig": [{
    "name": [{"service": "huaweicloud.rds.task.v1.TaskService", "method": "GetTaskDetail"}],
    "timeout": "30s",
    "retryPolicy": {
      "maxAttempts": 2,
      "initialBackoff": "0.2s",
      "maxBackoff": "2s",
      "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE"]
    }
  }]
}`

// [/retry]

func main() {
	log.SetFlags(0)
	// The word `watch` comes before the flags.
	arguments, defaultInstance, defaultTimeout := os.Args[1:], "1ffc4167903840cb93a3da56d28c14fdin01", 10.0
	watches := len(arguments) > 0 && arguments[0] == "watch"
	if watches {
		arguments, defaultInstance, defaultTimeout = arguments[1:], "lifecycle-20", 3600
	}
	target := flag.String("target", "127.0.0.1:50051", "address of the facade, HOST:PORT")
	ca := flag.String("ca", "", "PEM file of trusted certificates; plaintext if not set")
	cert := flag.String("cert", "", "PEM file of the client's certificate, for a facade with --tls-client-ca")
	key := flag.String("key", "", "PEM file of the certificate's key")
	token := flag.String("token", "", "RDS token of the caller, needed if the facade runs with --credentials caller")
	projectID := flag.String("project-id", "0483b6b16e954cb88930a360d2c4e663", "project that owns the instance")
	instanceID := flag.String("instance-id", defaultInstance, "database instance")
	workflowID := flag.String("workflow-id", "102772a9-31fa-4129-b9f8-7638e2792f3b", "task")
	timeout := flag.Float64("timeout", defaultTimeout, "deadline of the call or of the whole watch, in seconds")
	flag.CommandLine.Parse(arguments)
	if (*cert == "") != (*key == "") || *cert != "" && *ca == "" {
		log.Print("--cert and --key need each other and --ca")
		os.Exit(2)
	}

	transport := insecure.NewCredentials()
	if *ca != "" {
		roots, err := os.ReadFile(*ca)
		if err != nil {
			log.Fatal(err)
		}
		config := &tls.Config{RootCAs: x509.NewCertPool()}
		if !config.RootCAs.AppendCertsFromPEM(roots) {
			log.Fatalf("%s contains no certificate in PEM", *ca)
		}
		if *cert != "" {
			certificate, err := tls.LoadX509KeyPair(*cert, *key)
			if err != nil {
				log.Fatal(err)
			}
			config.Certificates = []tls.Certificate{certificate}
		}
		transport = credentials.NewTLS(config)
	}
	conn, err := grpc.NewClient(*target,
		grpc.WithTransportCredentials(transport),
		// PINGs detect a lost connection, on which a watch would wait for its deadline.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: time.Minute, Timeout: 20 * time.Second}),
		grpc.WithDefaultServiceConfig(serviceConfig))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(*timeout*float64(time.Second)))
	defer cancel()
	if *token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "x-auth-token", *token)
	}
	client := taskv1.NewTaskServiceClient(conn)
	if watches {
		os.Exit(watch(ctx, client, &taskv1.WatchTaskDetailRequest{
			ProjectId:  *projectID,
			InstanceId: *instanceID,
			WorkflowId: *workflowID,
		}))
	}
	reply, err := client.GetTaskDetail(ctx, &taskv1.GetTaskDetailRequest{
		ProjectId:  *projectID,
		InstanceId: *instanceID,
		WorkflowId: *workflowID,
	})
	if err != nil {
		printError(err)
		os.Exit(1)
	}
	fmt.Println(protojson.MarshalOptions{Multiline: true, UseProtoNames: true}.Format(reply))
}

// watch returns the exit code: 0 succeeded, 3 failed or canceled, 4 the time is over, 1 the call failed.
func watch(ctx context.Context, client taskv1.TaskServiceClient, request *taskv1.WatchTaskDetailRequest) int {
	deadline, _ := ctx.Deadline()
	pause := time.Second
	for {
		state, messages, err := follow(ctx, client, request)
		if err == nil {
			if state == taskv1.TaskState_TASK_STATE_SUCCEEDED {
				return 0
			}
			return 3
		}
		printError(err)
		if !isTransient(err) {
			return 1
		}
		if messages > 0 {
			pause = time.Second
		}
		jitter := 0.8 + 0.4*rand.Float64()
		delay := max(time.Duration(jitter*float64(pause)), retryDelay(err))
		pause = min(pause*8/5, 30*time.Second)
		if delay >= time.Until(deadline) {
			return 4
		}
		time.Sleep(delay)
	}
}

// follow reads one stream to its end and keeps the last etag in the request. Returns the last state and the number of messages.
func follow(ctx context.Context, client taskv1.TaskServiceClient, request *taskv1.WatchTaskDetailRequest) (state taskv1.TaskState, messages int, err error) {
	stream, err := client.WatchTaskDetail(ctx, request)
	if err != nil {
		return state, messages, err
	}
	for {
		message, err := stream.Recv()
		if err == io.EOF {
			return state, messages, nil
		}
		if err != nil {
			return state, messages, err
		}
		messages++
		if message.Task != nil {
			// The final state comes again if the connection was lost after it.
			if message.Etag != request.Etag {
				printState(message.Task)
			}
			state = message.Task.State
		}
		request.Etag = message.Etag
	}
}

func isTransient(err error) bool {
	reason := detail[*errdetails.ErrorInfo](err).GetReason()
	switch status.Code(err) {
	case codes.Unavailable, codes.ResourceExhausted, codes.Aborted, codes.DeadlineExceeded, codes.Canceled:
		return reason != "QUOTA_EXHAUSTED"
	case codes.Internal, codes.Unknown:
		// Without a reason, these codes come from a proxy or a lost connection.
		return reason == ""
	}
	return false
}

func printState(task *taskv1.GetTaskDetailResponse) {
	if task.ProgressPercent == nil {
		fmt.Println(task.State)
	} else {
		fmt.Printf("%v %d%%\n", task.State, *task.ProgressPercent)
	}
}

func printError(err error) {
	fmt.Fprintf(os.Stderr, "%v: %s\n", status.Code(err), status.Convert(err).Message())
	if info := detail[*errdetails.ErrorInfo](err); info != nil {
		fmt.Fprintln(os.Stderr, "reason:", info.Reason)
	}
	if delay := retryDelay(err); delay > 0 {
		fmt.Fprintln(os.Stderr, "retry after:", delay.Seconds(), "s")
	}
	if info := detail[*errdetails.RequestInfo](err); info != nil {
		fmt.Fprintln(os.Stderr, "request id:", info.RequestId)
	}
}

func retryDelay(err error) time.Duration {
	return detail[*errdetails.RetryInfo](err).GetRetryDelay().AsDuration()
}

// detail returns the error's detail of type T, or nil.
func detail[T any](err error) (found T) {
	for _, detail := range status.Convert(err).Details() {
		if detail, ok := detail.(T); ok {
			found = detail
		}
	}
	return found
}
