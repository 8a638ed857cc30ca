"""Looks up one task. Prints the reply or, if the call fails, its code, message, reason, retry delay and request id."""

import argparse
import json
import sys

import grpc
from google.protobuf import json_format
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from huaweicloud.rds.task.v1 import task_service_pb2, task_service_pb2_grpc

# The facade already retries RDS. One retry here covers an instance of the facade that stops during the call.
# [retry]
SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "huaweicloud.rds.task.v1.TaskService", "method": "GetTaskDetail"}],
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
# [/retry]


def main():
    arguments = parse_arguments()
    with open_channel(arguments.target, arguments.ca) as channel:
        try:
            reply = get_task_detail(channel, arguments)
        except grpc.RpcError as error:
            print_error(error)
            sys.exit(1)
    print(json_format.MessageToJson(reply, preserving_proto_field_name=True))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="127.0.0.1:50051", help="address of the facade, HOST:PORT")
    parser.add_argument("--ca", help="PEM file of trusted certificates; plaintext if not set")
    parser.add_argument("--token", help="RDS token of the caller, needed if the facade runs with --credentials caller")
    parser.add_argument("--project-id", default="0483b6b16e954cb88930a360d2c4e663", help="project that owns the instance")
    parser.add_argument("--instance-id", default="1ffc4167903840cb93a3da56d28c14fdin01", help="database instance")
    parser.add_argument("--workflow-id", default="102772a9-31fa-4129-b9f8-7638e2792f3b", help="task")
    parser.add_argument("--timeout", type=float, default=10, help="deadline of the call, in seconds")
    return parser.parse_args()


# [connection]
def open_channel(target, ca):
    options = [("grpc.service_config", json.dumps(SERVICE_CONFIG))]
    if ca is None:
        return grpc.insecure_channel(target, options)
    with open(ca, "rb") as file:
        credentials = grpc.ssl_channel_credentials(root_certificates=file.read())
    return grpc.secure_channel(target, credentials, options)


# [/connection]


# [call]
def get_task_detail(channel, arguments):
    stub = task_service_pb2_grpc.TaskServiceStub(channel)
    request = task_service_pb2.GetTaskDetailRequest(
        project_id=arguments.project_id,
        instance_id=arguments.instance_id,
        workflow_id=arguments.workflow_id,
    )
    metadata = [("x-auth-token", arguments.token)] if arguments.token else []
    return stub.GetTaskDetail(request, timeout=arguments.timeout, metadata=metadata)


# [/call]


# [error]
def print_error(error):
    print(f"{error.code().name}: {error.details()}", file=sys.stderr)
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else []:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            print("reason:", info.reason, file=sys.stderr)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            info = error_details_pb2.RetryInfo()
            detail.Unpack(info)
            print("retry after:", info.retry_delay.ToTimedelta().total_seconds(), "s", file=sys.stderr)
        elif detail.Is(error_details_pb2.RequestInfo.DESCRIPTOR):
            info = error_details_pb2.RequestInfo()
            detail.Unpack(info)
            print("request id:", info.request_id, file=sys.stderr)


# [/error]

if __name__ == "__main__":
    main()
