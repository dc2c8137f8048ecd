"""A small service for the supervisor's tests: `python service.py NAME VARIABLE [BEHAVIOUR]`.

It listens, announces itself and answers `/readyz` as the gateway does, so that the supervisor is
tested alone and in a second. BEHAVIOUR is `refuse` (one sentence, exit 1), `crash` (no sentence),
`loading` (never ready), `stubborn` (ignores SIGTERM), `building` (says how far it is) or `lost`
(once asked for `/lose`, ends as a service does whose device failed).
"""

import http.server
import json
import os
import signal
import sys

from services.common.parent import follow_parent

name, variable, behaviour = [*sys.argv[1:], ""][:3]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if behaviour == "lost" and self.path == "/lose":
            print("the device failed: start it again.", file=sys.stderr)
            os._exit(1)
        loading = behaviour == "loading"
        body = json.dumps({"awaited": {name: "it is loading"} if loading else {}}).encode()
        self.send_response(503 if loading else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        print(json.dumps({"level": "warning", "message": f"{name} was asked"}), file=sys.stderr)


if behaviour == "refuse":
    print("the model folder is empty", file=sys.stderr)
    sys.exit(1)
if behaviour == "crash":
    sys.exit(7)
follow_parent(2)
signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "stubborn" else signal.SIG_DFL)
server = http.server.HTTPServer(("127.0.0.1", int(os.environ[variable])), Handler)
print(json.dumps({"event": "listening", "service": name, "port": server.server_port}), flush=True)
if behaviour == "building":
    print(
        json.dumps({"event": "progress", "service": name, "message": "5 of 7 tokens"}), flush=True
    )
server.serve_forever()
