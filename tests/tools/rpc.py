"""Calls GetTaskDetail and WatchTaskDetail with grpcio and without generated code: their requests begin with the same four strings."""

import grpc
from facade import INSTANCE_ID, PROJECT_ID, SERVICE, WORKFLOW_ID, WORKFLOW_NAME

METHOD = f"/{SERVICE}/GetTaskDetail"
WATCH_METHOD = f"/{SERVICE}/WatchTaskDetail"


def request(instance_id=INSTANCE_ID, workflow_id=WORKFLOW_ID, project_id=PROJECT_ID):
    fields = [project_id, instance_id, workflow_id, WORKFLOW_NAME]
    parts = ((number, field.encode()) for number, field in enumerate(fields, 1))
    return b"".join(bytes([number << 3 | 2, len(text)]) + text for number, text in parts)


def call(channel, message=None, timeout=30, metadata=()):
    """Returns the name of the status code and the metadata of the reply."""
    method = channel.unary_unary(METHOD)
    try:
        _, done = method.with_call(message or request(), timeout=timeout, metadata=metadata)
        return "OK", dict(done.initial_metadata())
    except grpc.RpcError as error:
        metadata = {**dict(error.initial_metadata() or ()), **dict(error.trailing_metadata() or ())}
        return error.code().name, metadata


def watch(channel, message=None, timeout=30, metadata=()):
    """Returns the name of the status code and the messages of the stream."""
    messages = []
    try:
        for received in channel.unary_stream(WATCH_METHOD)(message or request(), timeout=timeout, metadata=metadata):
            messages.append(received)
        return "OK", messages
    except grpc.RpcError as error:
        return error.code().name, messages
