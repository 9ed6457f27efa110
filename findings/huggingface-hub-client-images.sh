#!/usr/bin/env bash
# huggingface_hub 2.4.0 (InferenceClient) with Pillow 12.3.0
#
# Guess:  each method that takes an image takes what its documentation lists: bytes, a
#         path, a file object or a PIL image. The request then holds that image once.
# Seen:   object_detection, image_segmentation, visual_question_answering and
#         zero_shot_image_classification raise ValueError on a file object and on a PIL
#         image before they send anything; document_question_answering takes them all.
#         visual_question_answering sends the image twice, as "inputs" and as "image",
#         with the question beside them, while the package's own type of that input has
#         both inside "inputs". With HF_HUB_OFFLINE=1 the client does not call a server
#         on 127.0.0.1 either.
# Output: for each method, what it takes and the JSON it sends (raw: the bytes of the
#         image alone), received by a server of this script on 127.0.0.1.
# Why it matters: a server for such clients has to read both layouts and twice the
#         bytes: a limit on the body of 10 MB is met by a picture of 3.75 MB. Tests on a
#         local server must not set HF_HUB_OFFLINE. Pass bytes or a path.
source "$(dirname "$0")/lib.sh"

install "huggingface_hub==2.4.0" "pillow==12.3.0"

probe <<'PY'
import base64, io, json, os, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

os.environ["HF_HUB_OFFLINE"] = "0"  # only 127.0.0.1 is called
os.environ["NO_PROXY"] = "127.0.0.1"
from huggingface_hub import InferenceClient, VisualQuestionAnsweringInput, VisualQuestionAnsweringInputData, constants
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image

Image.new("RGB", (8, 6)).save("picture.png")
with open("picture.png", "rb") as file:
    PICTURE = file.read()
ENCODED = base64.b64encode(PICTURE).decode()
received = []


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        received.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *args):
        pass


def layout(body):
    return "raw" if body == PICTURE else json.dumps(json.loads(body), sort_keys=True).replace(ENCODED, "IMAGE")


def show(task, **options):
    taken, refused, bodies = [], [], set()
    images = {"bytes": PICTURE, "path": "picture.png", "file": io.BytesIO(PICTURE), "PIL": Image.open("picture.png")}
    for name, image in images.items():
        received.clear()
        try:
            getattr(client, task)(image, **options)
            taken.append(name)
        except ValueError as error:
            refused.append(name)
            assert "Expected binary inputs or a local path or a URL" in str(error), error
        bodies.update(layout(body) for body in received)
    print(f"{task}: takes {', '.join(taken)}; ValueError for {', '.join(refused) or 'none'}; sends {' | '.join(bodies)}")


server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = InferenceClient(model=f"http://127.0.0.1:{server.server_port}")
show("object_detection")
show("image_segmentation")
show("zero_shot_image_classification", candidate_labels=["cat", "dog"])
show("visual_question_answering", question="why?")
show("document_question_answering", question="why?")
typed = VisualQuestionAnsweringInput(inputs=VisualQuestionAnsweringInputData(image="IMAGE", question="why?"))
print("VisualQuestionAnsweringInput:", json.dumps(dict(typed), sort_keys=True))

constants.HF_HUB_OFFLINE = True  # what HF_HUB_OFFLINE=1 sets at import
received.clear()
try:
    client.object_detection(PICTURE)
except OfflineModeIsEnabled as error:
    print(f"offline, 127.0.0.1: {type(error).__name__}, {len(received)} requests")
PY

expect <<'TXT'
object_detection: takes bytes, path; ValueError for file, PIL; sends raw
image_segmentation: takes bytes, path; ValueError for file, PIL; sends raw
zero_shot_image_classification: takes bytes, path; ValueError for file, PIL; sends {"inputs": "IMAGE", "parameters": {"candidate_labels": ["cat", "dog"]}}
visual_question_answering: takes bytes, path; ValueError for file, PIL; sends {"image": "IMAGE", "inputs": "IMAGE", "parameters": {}, "question": "why?"}
document_question_answering: takes bytes, path, file, PIL; ValueError for none; sends {"inputs": {"image": "IMAGE", "question": "why?"}, "parameters": {}}
VisualQuestionAnsweringInput: {"inputs": {"image": "IMAGE", "question": "why?"}, "parameters": null}
offline, 127.0.0.1: OfflineModeIsEnabled, 0 requests
TXT
