"""Looks up one task, or watches it until it is over. Prints the reply or each state; for an error, its code, message, reason, retry
delay and request id."""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import grpc
from google.protobuf import json_format
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from huaweicloud.rds.task.v1 import task_service_pb2, task_service_pb2_grpc
from huaweicloud.rds.task.v1.task_service_pb2 import TaskState

# The facade already retries RDS. One retry here covers an instance of the facade that stops during the call.
SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "huaweicloud.rds.task.v1.TaskService", "method": "GetTaskDetail"}],
            "timeout": "30s",
            "retryPolicy": {
                "maxAttempts": 2,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def main():
    arguments = parse_arguments()
    with open_channel(arguments) as channel:
        if arguments.command == "watch":
            sys.exit(watch(channel, arguments))
        try:
            reply = get_task_detail(channel, arguments)
        except grpc.RpcError as error:
            print_error(error)
            sys.exit(1)
    print(json_format.MessageToJson(reply, preserving_proto_field_name=True))


def parse_arguments():
    watches = sys.argv[1:2] == ["watch"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="?", choices=["watch"], help="watch the task; one call if not set")
    parser.add_argument("--target", default="127.0.0.1:50051", help="address of the facade, HOST:PORT")
    parser.add_argument("--ca", help="PEM file of trusted certificates; plaintext if not set")
    parser.add_argument("--cert", help="PEM file of the client's certificate, for a facade with --tls-client-ca")
    parser.add_argument("--key", help="PEM file of the certificate's key")
    parser.add_argument("--token", help="RDS token of the caller, needed if the facade runs with --credentials caller")
    parser.add_argument("--project-id", default="0483b6b16e954cb88930a360d2c4e663", help="project that owns the instance")
    instance_id = "lifecycle-20" if watches else "1ffc4167903840cb93a3da56d28c14fdin01"
    parser.add_argument("--instance-id", default=instance_id, help="database instance")
    parser.add_argument("--workflow-id", default="102772a9-31fa-4129-b9f8-7638e2792f3b", help="task")
    timeout = 3600 if watches else 10
    parser.add_argument("--timeout", type=float, default=timeout, help="deadline of the call or of the whole watch, in seconds")
    arguments = parser.parse_args()
    if bool(arguments.cert) != bool(arguments.key) or arguments.cert and not arguments.ca:
        parser.error("--cert and --key need each other and --ca")
    return arguments


# [connection]
def open_channel(arguments):
    options = [
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        # PINGs detect a lost connection, on which a watch would wait for its deadline.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if arguments.ca is None:
        return grpc.insecure_channel(arguments.target, options)
    roots, key, certificate = (path and Path(path).read_bytes() for path in (arguments.ca, arguments.key, arguments.cert))
    return grpc.secure_channel(arguments.target, grpc.ssl_channel_credentials(roots, key, certificate), options)


# [/connection]


# [call]
def get_task_detail(channel, arguments):
    stub = task_service_pb2_grpc.TaskServiceStub(channel)
    request = task_service_pb2.GetTaskDetailRequest(
        project_id=arguments.project_id,
        instance_id=arguments.instance_id,
        workflow_id=arguments.workflow_id,
    )
    return stub.GetTaskDetail(request, timeout=arguments.timeout, metadata=metadata(arguments))


def metadata(arguments):
    return [("x-auth-token", arguments.token)] if arguments.token else []


# [/call]


# [watch]
TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
}


def watch(channel, arguments):
    """Returns the exit code: 0 succeeded, 3 failed or canceled, 4 the time is over, 1 the call failed."""
    stub = task_service_pb2_grpc.TaskServiceStub(channel)
    request = task_service_pb2.WatchTaskDetailRequest(
        project_id=arguments.project_id,
        instance_id=arguments.instance_id,
        workflow_id=arguments.workflow_id,
    )
    deadline = time.monotonic() + arguments.timeout
    state = TaskState.TASK_STATE_UNSPECIFIED
    pause = 1
    while True:
        try:
            left = deadline - time.monotonic()
            for message in stub.WatchTaskDetail(request, timeout=left, metadata=metadata(arguments)):
                pause = 1
                if message.HasField("task"):
                    # The final state comes again if the connection was lost after it.
                    if message.etag != request.etag:
                        print_state(message.task)
                    state = message.task.state
                request.etag = message.etag
            return 0 if state == TaskState.TASK_STATE_SUCCEEDED else 3
        except grpc.RpcError as error:
            print_error(error)
            if not is_transient(error):
                return 1
            delay = max(pause * random.uniform(0.8, 1.2), retry_delay(error))
            pause = min(pause * 1.6, 30)
        if delay >= deadline - time.monotonic():
            return 4
        time.sleep(delay)


def is_transient(error):
    reason = detail(error, error_details_pb2.ErrorInfo).reason
    # Without a reason, these codes come from a proxy or a lost connection.
    if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        return not reason
    return error.code() in TRANSIENT and reason != "QUOTA_EXHAUSTED"


def print_state(task):
    state = TaskState.Name(task.state) if task.state in TaskState.values() else task.state
    percent = f" {task.progress_percent}%" if task.HasField("progress_percent") else ""
    print(f"{state}{percent}", flush=True)


# [/watch]


# [error]
def print_error(error):
    print(f"{error.code().name}: {error.details()}", file=sys.stderr)
    if reason := detail(error, error_details_pb2.ErrorInfo).reason:
        print("reason:", reason, file=sys.stderr)
    if delay := retry_delay(error):
        print("retry after:", delay, "s", file=sys.stderr)
    if request_id := detail(error, error_details_pb2.RequestInfo).request_id:
        print("request id:", request_id, file=sys.stderr)


def retry_delay(error):
    return detail(error, error_details_pb2.RetryInfo).retry_delay.ToTimedelta().total_seconds()


def detail(error, kind):
    """Returns the error's detail of this type; an empty message if there is none."""
    found = kind()
    status = rpc_status.from_call(error)
    for packed in status.details if status is not None else []:
        packed.Unpack(found)
    return found


# [/error]

if __name__ == "__main__":
    main()
