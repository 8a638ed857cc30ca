// Looks up one task. Prints the reply or, if the call fails, its code, message, reason, retry delay and request id.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
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
	target := flag.String("target", "127.0.0.1:50051", "address of the facade, HOST:PORT")
	ca := flag.String("ca", "", "PEM file of trusted certificates; plaintext if not set")
	token := flag.String("token", "", "RDS token of the caller, needed if the facade runs with --credentials caller")
	projectID := flag.String("project-id", "0483b6b16e954cb88930a360d2c4e663", "project that owns the instance")
	instanceID := flag.String("instance-id", "1ffc4167903840cb93a3da56d28c14fdin01", "database instance")
	workflowID := flag.String("workflow-id", "102772a9-31fa-4129-b9f8-7638e2792f3b", "task")
	timeout := flag.Float64("timeout", 10, "deadline of the call, in seconds")
	flag.Parse()

	// [connection]
	transport := insecure.NewCredentials()
	if *ca != "" {
		var err error
		if transport, err = credentials.NewClientTLSFromFile(*ca, ""); err != nil {
			log.Fatal(err)
		}
	}
	conn, err := grpc.NewClient(*target,
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultServiceConfig(serviceConfig))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	// [/connection]

	// [call]
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(*timeout*float64(time.Second)))
	defer cancel()
	if *token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "x-auth-token", *token)
	}
	reply, err := taskv1.NewTaskServiceClient(conn).GetTaskDetail(ctx, &taskv1.GetTaskDetailRequest{
		ProjectId:  *projectID,
		InstanceId: *instanceID,
		WorkflowId: *workflowID,
	})
	// [/call]
	if err != nil {
		printError(err)
		os.Exit(1)
	}
	fmt.Println(protojson.MarshalOptions{Multiline: true, UseProtoNames: true}.Format(reply))
}

// [error]
func printError(err error) {
	grpcStatus := status.Convert(err)
	fmt.Fprintf(os.Stderr, "%v: %s\n", grpcStatus.Code(), grpcStatus.Message())
	for _, detail := range grpcStatus.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			fmt.Fprintln(os.Stderr, "reason:", detail.Reason)
		case *errdetails.RetryInfo:
			fmt.Fprintln(os.Stderr, "retry after:", detail.RetryDelay.AsDuration().Seconds(), "s")
		case *errdetails.RequestInfo:
			fmt.Fprintln(os.Stderr, "request id:", detail.RequestId)
		}
	}
}

// [/error]
