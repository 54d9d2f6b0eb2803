"""The server as a Label Studio ML backend: regions for tasks, texts of a project, images that are refused, interfaces that draw no boxes."""

# ruff: noqa: F811

import base64
import importlib.util
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from glip_jax.cli.serving import label_studio  # noqa: E402
from tests.cli.test_serve import Running, ask, client, pixels, png, refused, server, service, service_without_thread  # noqa: E402, F401

pytestmark = pytest.mark.compiles

INTERFACE = """<View><Image name="img" value="$image"/>
<RectangleLabels name="box" toName="img"><Label value="cat"/><Label value="red car"/></RectangleLabels>
<TextArea name="prompt" toName="img"/></View>"""


def predict(client, *addresses, interface=INTERFACE, **more):
    tasks = [{"id": number, "data": {"image": address}} for number, address in enumerate(addresses, 1)]
    return client.post("/predict", json={"tasks": tasks, "label_config": interface, "project": "7.1", **more})


def typed(text):
    return {"context": {"result": [{"from_name": "prompt", "type": "textarea", "value": {"text": [text]}}]}}


def test_label_studio_gets_regions_in_percent_for_several_tasks(client):
    version = client.post(
        "/setup", json={"project": "7.1", "schema": INTERFACE, "hostname": "x", "access_token": "y"}
    ).json()["model_version"]
    assert version == "tiny 000000000000" and client.get("/health").json()["status"] == "UP"
    low = INTERFACE.replace('toName="img">', 'toName="img" model_score_threshold="0.01">', 1)
    carried = "data:image/png;base64," + base64.b64encode(png(1, 40, 60)).decode()
    answer = predict(
        client, carried, "/data/upload/one.png", "/data/local-files/?d=upload%2Fone.png", interface=low
    ).json()
    assert answer["model_version"] == version and len(answer["results"]) == 3
    assert answer["results"][1]["result"] == answer["results"][2]["result"] != []
    regions, whole = (
        answer["results"][0]["result"],
        ask(client, png(1, 40, 60), names="cat,red car", threshold="0.01").json(),
    )
    for region, found in zip(regions, whole["detections"], strict=True):
        x1, y1, x2, y2 = found["box"]
        sides = [region["value"][side] for side in ("x", "y", "width", "height")]
        assert sides == pytest.approx([x1 / 0.6, y1 / 0.4, (x2 - x1) / 0.6, (y2 - y1) / 0.4], abs=1e-6)
        assert (region["value"]["rectanglelabels"], region["score"]) == ([found["name"]], found["score"])
    first = regions[0]
    assert (first["from_name"], first["to_name"], first["type"]) == ("box", "img", "rectanglelabels")
    assert (first["original_width"], first["original_height"]) == (60, 40)
    # A typed text is asked instead, and kept for the project.
    labels = [{label for region in predict(client, carried, interface=low, **more).json()["results"][0]["result"] for label in region["value"]["rectanglelabels"]}
              for more in ({"params": typed("a red car . a cat")}, {})]  # fmt: skip
    assert labels[0] == labels[1] <= {"cat", "red car"} and labels[0]
    refused(
        predict(client, carried, params=typed("two dogs")), 422, "the text's phrase 'two dogs' is none of the 2 labels"
    )
    # What cannot be asked is not kept.
    assert predict(client, carried, interface=low).status_code == 200
    # Half a character of a client comes back as its number.
    tasks = r'{"tasks": [{"id": "\ud800", "data": {"image": "a"}}], "label_config": "<View/>"}'.replace(
        '"<View/>"', json.dumps(INTERFACE)
    )
    answer = client.post("/predict", content=tasks.encode(), headers={"content-type": "application/json"})
    refused(answer, 422, r"task '\\ud800': img|task '\\ud800': image names no file")


RECTANGLE = """<View><Image name="img" value="$image"/><Rectangle name="rect" toName="img" model_score_threshold="0.01"/>
<Labels name="lab" toName="img"><Label value="cat"/><Label value="red car"/></Labels></View>"""


def test_a_box_of_a_rectangle_with_labels_is_two_regions_of_one_identifier(client):
    carried = "data:image/png;base64," + base64.b64encode(png(1, 40, 60)).decode()
    (result,) = predict(client, carried, interface=RECTANGLE, project="rectangles").json()["results"]
    boxes, labels = result["result"][::2], result["result"][1::2]
    assert {(box["from_name"], box["type"]) for box in boxes} == {("rect", "rectangle")}
    assert {(label["from_name"], label["type"]) for label in labels} == {("lab", "labels")}
    assert len({box["id"] for box in boxes}) == len(boxes) == len(labels) > 1
    for box, label in zip(boxes, labels):
        assert box["id"] == label["id"] and label["value"] == {**box["value"], "labels": label["value"]["labels"]}
        assert label["value"]["labels"][0] in ("cat", "red car") and set(box["value"]) == {
            "x",
            "y",
            "width",
            "height",
            "rotation",
        }


@pytest.mark.skipif(
    importlib.util.find_spec("label_studio_sdk") is None,
    reason="label-studio-sdk is not installed: pip install label-studio-sdk",
)
def test_label_studio_itself_takes_the_regions(client):
    """By the check of Label Studio's own package, with which it takes predictions."""
    from label_studio_sdk.label_interface import LabelInterface  # pyright: ignore[reportMissingImports]

    low = INTERFACE.replace('toName="img">', 'toName="img" model_score_threshold="0.01">', 1)
    for interface in (low, RECTANGLE):
        (result,) = predict(client, "upload/one.png", interface=interface, project="sdk").json()["results"]
        assert LabelInterface(interface).validate_prediction(result, return_errors=True) == [] != result["result"]


def test_what_takes_long_before_the_detector_keeps_nobody_waiting(client, service, monkeypatch):
    query = service.query
    monkeypatch.setattr(service, "query", lambda *arguments, **named: (time.sleep(1), query(*arguments, **named))[1])
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(predict, client, "upload/one.png", project="long")
        time.sleep(0.2)
        begin = time.monotonic()
        client.get("/health")
        assert time.monotonic() - begin < 0.5 and not asked.done()
        assert asked.result().status_code == 200


@pytest.mark.parametrize(
    ("address", "status", "text"),
    [
        ("http://10.0.0.1/secret.png", 422, "task 1: image is an address of another host or storage, which is never fetched"),
        ("s3://bucket/a.png", 422, "never fetched"),
        ("file:///etc/passwd", 422, "never fetched"),
        ("//host/a.png", 422, "never fetched"),
        ("/data/upload/../../etc/passwd", 422, "names no file below the folder"),
        ("/data/local-files/?d=%2Fetc%2Fpasswd", 422, "names no file below the folder"),
        ("link.png", 422, "names no file below the folder"),
        ("upload/one.png\0", 422, "names no file below the folder"),
        ("/data/.env", 422, "names no file below the folder of --label-studio-files that ends as images do$"),
        ("large.png", 413, "has more than 1,000,000 bytes"),
        ("", 422, "is not there"),
        (7, 422, "is not there"),
        ("data:image/png;base64,!!!", 422, "whose base64 is damaged"),
        ("data:image/png;base64,aGVsbG8=", 415, "is no image that can be read"),
    ],
)  # fmt: skip
def test_label_studio_images_are_carried_or_below_the_folder(client, address, status, text):
    refused(predict(client, address, project="other"), status, text)


def test_label_studio_interfaces_that_draw_no_boxes_are_refused(client, service, monkeypatch):
    monkeypatch.setattr(label_studio, "_INTERFACE", 1000)
    bomb = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><View>&c;</View>'
    for interface, text in ((bomb, "is no XML"), ("<View", "is no XML"), ("<View/>", "has no <RectangleLabels>"),
                            (INTERFACE.replace('toName="img"', 'toName="x"'), "names no <Image>"),
                            (INTERFACE.replace('name="box"', f'name="{"x" * 201}"'), "a tag has a name of more than 200 characters"),
                            (INTERFACE.replace("cat", "x" * 900), "label_config has 1\\d+ characters: expected at most 1000"),
                            (INTERFACE.replace('toName="img">', 'toName="img" model_score_threshold="high">', 1), "expected 0 <= threshold < 1")):  # fmt: skip
        refused(client.post("/validate", json={"config": interface}), 422, text)
        refused(predict(client, "upload/one.png", interface=interface, project="o"), 422, text)
    bare = INTERFACE.replace('<Label value="cat"/><Label value="red car"/>', "")
    refused(predict(client, "upload/one.png", interface=bare, project="o"), 422, "has no <Label> to ask for")
    refused(client.post("/predict", json={"tasks": []}), 422, "label_config: Field required")
    assert client.post("/validate", json={"config": INTERFACE}).status_code == 200
    without = Running(service_without_thread(service))
    try:
        with httpx.Client(base_url=without.address) as other:
            refused(
                predict(other, "upload/one.png"),
                422,
                "this server reads no files: start it with --label-studio-files=DIR",
            )
    finally:
        without.stop()
