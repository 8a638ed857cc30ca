"""Checks each credential source against a fake RDS that verifies signatures with the Signer of the vendor's SDK.

The vendor's client must pass the fake first, so that an error in the fake cannot hide one in the facade.
"""

import tempfile
from pathlib import Path

import sdk_client
from facade import EXAMPLE_TASK, PROJECT_ID, SANDBOX_AK, SANDBOX_SK, Checks, Facade
from gateway import Gateway

AK, SK, SECURITY_TOKEN = SANDBOX_AK, SANDBOX_SK, "temporary/key+token=="
WRONG_SK = SK[:-1] + ("x" if SK[-1] != "x" else "y")
TOKEN = "MII-caller-token"
USER = ("an-user", "a-pass/word", "an-account")


def main():
    checks = Checks()
    vendor_client_passes(checks)
    keys_of_the_environment(checks)
    with tempfile.TemporaryDirectory() as folder:
        keys_of_the_profile(checks, Path(folder))
        keys_of_the_metadata_service(checks)
        tokens_of_iam(checks, Path(folder))
        tokens_of_a_file_and_of_the_caller(checks, Path(folder))
    checks.finish()


def vendor_client_passes(checks):
    with Gateway(keys={(AK, None): SK, (AK, SECURITY_TOKEN): SK}) as gateway:
        for name, token in (("key", None), ("temporary key", SECURITY_TOKEN)):
            task = sdk_client.show_task_detail(gateway.url, SK, security_token=token)
            checks.equal(f"the vendor's client with a {name} is accepted", task.job_id, EXAMPLE_TASK["job_id"])
        failure = sdk_client.rejection(gateway.url, secret=WRONG_SK)
        checks.equal("the vendor's client with a wrong SK is rejected", failure and failure.error_code, "APIGW.0301")


def keys_of_the_environment(checks):
    key = {"HUAWEICLOUD_SDK_AK": AK, "HUAWEICLOUD_SDK_SK": SK}
    with Gateway(keys={(AK, None): SK}) as gateway:
        accepted(checks, "env", gateway, ["--credentials=env"], key)
    with Gateway(keys={(AK, SECURITY_TOKEN): SK}) as gateway:
        temporary = {**key, "HUAWEICLOUD_SDK_SECURITY_TOKEN": SECURITY_TOKEN}
        accepted(checks, "env with a security token", gateway, ["--credentials=env"], temporary)
        accepted(checks, "chain", gateway, ["--credentials=chain"], temporary)
    with Gateway(keys={(AK, None): SK}) as gateway:
        wrong = {**key, "HUAWEICLOUD_SDK_SK": WRONG_SK}
        rejected(checks, "env with one character of the SK changed", gateway, ["--credentials=env"], wrong)


def keys_of_the_profile(checks, folder):
    profile = folder / "credentials"
    variables = {"HUAWEICLOUD_SDK_CREDENTIALS_FILE": str(profile)}
    with Gateway(keys={(AK, None): SK}) as gateway:
        profile.write_text(f"[basic]\nak = {AK}\nsk = {SK}\n")
        accepted(checks, "profile", gateway, ["--credentials=profile"], variables)
    with Gateway(keys={(AK, SECURITY_TOKEN): SK}) as gateway:
        profile.write_text(f"[basic]\nak = {AK}\nsk = {SK}\nsecurity_token = {SECURITY_TOKEN}\n")
        accepted(checks, "profile with a security token", gateway, ["--credentials=profile"], variables)


def keys_of_the_metadata_service(checks):
    with Gateway(keys={(AK, SECURITY_TOKEN): SK}, metadata_key=(AK, SK, SECURITY_TOKEN)) as gateway:
        source = ["--credentials=metadata", f"--metadata-endpoint={gateway.url}"]
        accepted(checks, "metadata", gateway, source, {})
    with Gateway(keys={(AK, SECURITY_TOKEN): SK}, metadata_key=(AK, WRONG_SK, SECURITY_TOKEN)) as gateway:
        source = ["--credentials=metadata", f"--metadata-endpoint={gateway.url}"]
        rejected(checks, "metadata with a wrong SK", gateway, source, {})


def tokens_of_iam(checks, folder):
    name, password, domain = USER
    password_file = folder / "password"
    password_file.write_text(password + "\n")
    source = [
        "--credentials=iam",
        f"--iam-user={name}",
        f"--iam-domain={domain}",
        f"--iam-password-file={password_file}",
        f"--iam-project={PROJECT_ID}",
    ]
    with Gateway(user=USER) as gateway:
        accepted(checks, "iam", gateway, [*source, f"--iam-endpoint={gateway.url}"], {})
        checks.equal("iam requests one token", len(gateway.tokens), 1)


def tokens_of_a_file_and_of_the_caller(checks, folder):
    token_file = folder / "token"
    token_file.write_text(TOKEN + "\n")
    with Gateway(tokens=[TOKEN]) as gateway:
        accepted(checks, "token", gateway, ["--credentials=token", f"--token-file={token_file}"], {})
        variable = {"RDS_TASK_FACADE_TOKEN": TOKEN}
        accepted(checks, "token of the variable", gateway, ["--credentials=token"], variable)
        caller = ["--token-file", str(token_file)]
        accepted(checks, "caller", gateway, ["--credentials=caller"], {}, call_arguments=caller)
    with Gateway(tokens=["another"]) as gateway:
        rejected(checks, "unknown token", gateway, ["--credentials=token"], {"RDS_TASK_FACADE_TOKEN": TOKEN})


def accepted(checks, name, gateway, source, variables, call_arguments=()):
    before = len(gateway.requests)
    with Facade(f"--endpoint={gateway.url}", *source, environment=variables) as facade:
        facade.wait_until_serving()
        for _ in range(2):
            code, reply, error = facade.call(*call_arguments)
            checks.that(f"{name}: the call succeeds", code == 0, error)
            if reply is not None:
                result = {key: reply.get(key) for key in EXAMPLE_TASK}
                checks.equal(f"{name}: the reply is the example task", result, EXAMPLE_TASK)
        no_secret_logged(checks, name, facade)
    problems = [request[3] for request in gateway.requests[before:]]
    checks.equal(f"{name}: upstream received two requests and accepted both", problems, [None, None])


def rejected(checks, name, gateway, source, variables):
    with Facade(f"--endpoint={gateway.url}", *source, environment=variables) as facade:
        facade.wait_until_serving()
        code, _, error = facade.call()
        checks.that(f"{name}: the call fails", code == 1, error)
        checks.that(f"{name}: the reason is CREDENTIAL_REJECTED", "CREDENTIAL_REJECTED" in error, error)
        no_secret_logged(checks, name, facade)
    problems = {request[3] for request in gateway.requests}
    checks.that(f"{name}: upstream rejected it", problems and None not in problems, problems)


def no_secret_logged(checks, name, facade):
    log = "\n".join(facade.output)
    leaked = [secret for secret in (SK, WRONG_SK, SECURITY_TOKEN, TOKEN, USER[1]) if secret in log]
    checks.equal(f"{name}: the log contains no secret", leaked, [])


if __name__ == "__main__":
    main()
