"""A fake of the vendor's services on loopback. Verifies signatures with the Signer of the vendor's SDK.

One HTTP server stands for RDS (token or signature), IAM (tokens for a password) and the metadata service (temporary keys,
hardened mode included).
"""

import json
import threading
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huaweicloudsdkcore.auth.credentials import BasicCredentials
from huaweicloudsdkcore.sdk_request import SdkRequest
from huaweicloudsdkcore.signer.signer import Signer

from facade import EXAMPLE_TASK, INSTANCE_ID, PROJECT_ID, WORKFLOW_ID, WORKFLOW_NAME

RDS_PATH = f"/v3/{PROJECT_ID}/instances/{INSTANCE_ID}/task-center-detail"
WINDOW = timedelta(minutes=15)
KNOWN_BODIES = ({"workflow_id": WORKFLOW_ID}, {"workflow_id": WORKFLOW_ID, "workflow_name": WORKFLOW_NAME})


class Gateway(ThreadingHTTPServer):
    """Accepts signatures by `keys`, a map from (AK, security token or None) to SK, and `tokens`. Issues tokens to `user`."""

    daemon_threads = True

    def __init__(self, keys=None, tokens=(), user=None, metadata_key=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.keys = dict(keys or {})
        self.tokens = set(tokens)
        self.user = user
        self.metadata_key = metadata_key
        # Each request to RDS: path, headers, body, and the problem for which it was rejected, or None.
        self.requests = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    @property
    def host(self):
        return self.url.removeprefix("http://")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.partition("?")[0] == "/v3/auth/tokens":
            self.issue_token(json.loads(body))
            return
        problem = problem_of(self.server, self.command, self.path, self.headers, body)
        self.server.requests.append((self.path, self.headers, body, problem))
        if problem is None:
            self.answer(200, EXAMPLE_TASK)
        else:
            message = f"Incorrect IAM authentication information: {problem}"
            self.answer(401, {"error_msg": message, "error_code": "APIGW.0301", "request_id": "verifier"})

    def issue_token(self, body):
        identity = body["auth"]["identity"]
        user = identity["password"]["user"]
        given = (user["name"], user["password"], user["domain"]["name"])
        scope = body["auth"]["scope"]["project"]
        if identity["methods"] != ["password"] or given != self.server.user or PROJECT_ID not in scope.values():
            self.answer(401, {"error": {"code": 401, "message": "wrong", "title": "Unauthorized"}})
            return
        token = f"MII-issued-{len(self.server.tokens)}"
        self.server.tokens.add(token)
        times = {"expires_at": in_hours(24), "issued_at": in_hours(0)}
        self.answer(201, {"token": {**times, "methods": ["password"]}}, {"X-Subject-Token": token})

    def do_PUT(self):
        if self.path != "/meta-data/latest/api/token" or not self.headers.get("X-Metadata-Token-Ttl-Seconds"):
            self.answer(404, {})
            return
        self.send(200, b"metadata-token", "text/plain", {})

    def do_GET(self):
        if self.path != "/openstack/latest/securitykey" or self.server.metadata_key is None:
            self.answer(404, {})
        elif self.headers.get("X-Metadata-Token") != "metadata-token":
            self.answer(401, {})
        else:
            access, secret, security_token = self.server.metadata_key
            key = {"access": access, "secret": secret, "securitytoken": security_token, "expires_at": in_hours(24)}
            self.answer(200, {"credential": key})

    def answer(self, status, body, headers=None):
        self.send(status, json.dumps(body).encode(), "application/json", headers or {})

    def send(self, status, body, content_type, headers):
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "X-Request-Id": "verifier", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def problem_of(gateway, method, path, headers, body):
    """How the request differs from the RDS API reference and the request signing guide, or None."""
    if path != RDS_PATH:
        return f"path {path}"
    if headers.get_all("Content-Type") != ["application/json"]:
        return "Content-Type"
    if headers.get_all("Host") != [gateway.host]:
        return "Host"
    if json.loads(body) not in KNOWN_BODIES:
        return "body"
    token, authorization = headers.get("X-Auth-Token"), headers.get("Authorization")
    if (token is None) == (authorization is None):
        return "expected either X-Auth-Token or Authorization"
    if token is not None:
        return None if token in gateway.tokens else "decrypt token fail"
    return signature_problem(gateway, method, path, headers, body, authorization)


def signature_problem(gateway, method, path, headers, body, authorization):
    algorithm, _, rest = authorization.partition(" ")
    parts = dict(part.partition("=")[::2] for part in rest.split(", "))
    if algorithm != "SDK-HMAC-SHA256" or set(parts) != {"Access", "SignedHeaders", "Signature"}:
        return "form of Authorization"
    secret = gateway.keys.get((parts["Access"], headers.get("X-Security-Token")))
    if secret is None:
        return "Get secretKey failed, ak not exist"

    names = parts["SignedHeaders"].split(";")
    needed = {"content-type", "host", "x-project-id", "x-sdk-date"}
    if headers.get("X-Security-Token") is not None:
        needed.add("x-security-token")
    if not needed <= set(names) or headers.get("X-Project-Id") != PROJECT_ID:
        return f"signed headers {names}"
    date = datetime.strptime(headers["X-Sdk-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
    if abs(datetime.now(timezone.utc) - date) > WINDOW:
        return "X-Sdk-Date"

    request = SdkRequest(
        method=method,
        schema="http",
        host=gateway.host,
        resource_path=path,
        query_params=[],
        header_params={name: headers[name] for name in names},
        body=body,
    )
    signed = Signer(BasicCredentials(parts["Access"], secret, PROJECT_ID)).sign(request)
    expected = signed.header_params["Authorization"]
    return None if authorization == expected else "verify aksk signature fail"


def in_hours(hours):
    moment = datetime.now(timezone.utc) + timedelta(hours=hours)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
