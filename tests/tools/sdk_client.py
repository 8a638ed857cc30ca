"""Checks that the vendor's client, huaweicloudsdkrds, gets the example task from `sandbox` and parses its errors."""

from huaweicloudsdkcore.auth.credentials import BasicCredentials
from huaweicloudsdkcore.exceptions.exceptions import ClientRequestException
from huaweicloudsdkrds.v3 import RdsClient, ShowTaskDetailRequest, TaskDetailRequest

from facade import (
    EXAMPLE_TASK,
    INSTANCE_ID,
    PROJECT_ID,
    SANDBOX_AK,
    SANDBOX_SECURITY_TOKEN,
    SANDBOX_SK,
    WORKFLOW_ID,
    WORKFLOW_NAME,
    Checks,
    Sandbox,
)


def main():
    checks = Checks()
    with Sandbox() as sandbox:
        for name, security_token in (("a key", None), ("a temporary key", SANDBOX_SECURITY_TOKEN)):
            task = show_task_detail(sandbox.url, SANDBOX_SK, security_token=security_token)
            checks.equal(f"{name} gets the example task", {key: getattr(task, key) for key in EXAMPLE_TASK}, EXAMPLE_TASK)

        cases = (
            ("a wrong SK", {"secret": SANDBOX_SK + "x"}, 401, "APIGW.0301"),
            ("an unknown workflow", {"workflow_id": "nope"}, None, "DBS.200543"),
        )
        for name, changed, status, code in cases:
            failure = rejection(sandbox.url, **{"secret": SANDBOX_SK, **changed})
            checks.equal(f"{name} is rejected with {code}", failure and failure.error_code, code)
            checks.that(f"{name} has a request id", failure is not None and failure.request_id, failure)
            if status is not None:
                checks.equal(f"{name} is rejected with {status}", failure and failure.status_code, status)
    checks.finish()


def show_task_detail(endpoint, secret, workflow_id=WORKFLOW_ID, security_token=None):
    credentials = BasicCredentials(SANDBOX_AK, secret, PROJECT_ID)
    if security_token is not None:
        credentials = credentials.with_security_token(security_token)
    client = RdsClient.new_builder().with_credentials(credentials).with_endpoint(endpoint).build()
    body = TaskDetailRequest(workflow_id=workflow_id, workflow_name=WORKFLOW_NAME)
    return client.show_task_detail(ShowTaskDetailRequest(instance_id=INSTANCE_ID, body=body))


def rejection(endpoint, **arguments):
    """The exception that the client raises, or None."""
    try:
        show_task_detail(endpoint, **arguments)
    except ClientRequestException as failure:
        return failure
    return None


if __name__ == "__main__":
    main()
