"""Prompt files in all their forms, and reproducible draws."""

from __future__ import annotations

import json

import pytest

from reward_lab.lora_train.config import Prompt
from reward_lab.lora_train.prompts import PromptSampler, parse_prompt_lines, read_prompt_file, split


def _file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xef\xbb\xbfa cat\r\n\r\na dog\r\na cat\r\n"),
        ("a.txt", "a cat\na dog\n".encode("utf-16")),
        ("a.txt", "a cat\ra dog"),
        ("a.csv", b"\xef\xbb\xbfid,Prompt\r\n1,a cat\r\n2,a dog\r\n3,\r\n"),
        ("a.json", json.dumps(["a cat", {"text": "a dog"}])),
        ("a.json", json.dumps({"prompts": ["a cat", {"caption": "a dog"}]})),
        ("a.jsonl", '{"prompt": "a cat"}\n\n"a dog"\n'),
    ],
)
def test_formats(tmp_path, name, content):
    assert [prompt.text for prompt in read_prompt_file(_file(tmp_path, name, content))] == ["a cat", "a dog"]


def test_csv_weights_and_quoted_lines(tmp_path):
    prompts = read_prompt_file(_file(tmp_path, "a.csv", 'prompt,weight\n"a cat, sitting",2.5\na dog,\n'))
    assert prompts == [Prompt(text="a cat, sitting", weight=2.5), Prompt(text="a dog", weight=1.0)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds no prompt"),
        ("a.txt", b"\xef\xbb\xbf\r\n \r\n", "holds no prompt"),
        ("a.txt", "short\n" + "x" * 10_000_000, "line 2 of a.txt has 10000000 characters, the limit is 10000"),
        ("a.csv", "prompt\n" + "x" * 200_000, "line 2 of a.csv has 200000 characters"),
        ("a.json", json.dumps(["x" * 20_000]), "entry 1 has 20000 characters"),
        ("a.txt", b"caf\xe9", "not utf-8 text"),
        ("a.csv", "a,b\n1,2\n", "one must be called prompt"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[3]", "entry 1 holds no prompt"),
        ("a.csv", "prompt,weight\nx,-1\n", "greater than 0"),
        ("a.csv", "prompt,weight\nx,much\n", "line 2 has the weight 'much'"),
        ("a.pdf", "x", "use .txt, .csv"),
        ("a.json", json.dumps(["", " "]), "holds no prompt; write"),
        ("a.csv", 'prompt\nx\n"' + "long line\n" * 20_000 + '"', r"a.csv cannot be read as CSV near line \d+ \(field larger than field limit"),
    ],
)
def test_refusals(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_prompt_file(_file(tmp_path, name, content))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "prompt,weight\na,1\na,3\nb,1\n"),
        ("a.txt", "a\nb\na\na\na\n"),
        ("a.json", json.dumps([{"text": "a", "weight": 4}, "", {"text": " "}, "b"])),
        ("a.jsonl", '{"text": "a", "weight": 3.5}\n""\n"b"\n{"text": "a", "weight": 0.5}\n'),
    ],
)
def test_weights_of_repeated_prompts_are_added_and_empty_entries_dropped(tmp_path, name, content):
    assert read_prompt_file(_file(tmp_path, name, content)) == [Prompt(text="a", weight=4.0), Prompt(text="b", weight=1.0)]


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_prompt_file(tmp_path / "none.txt")


def test_every_prompt_once_per_pass_and_draws_depend_on_the_position_only():
    prompts = parse_prompt_lines("a\nb\nc")
    drawn = PromptSampler(prompts, 7).draw(0, 9)
    assert all(sorted(drawn[start : start + 3]) == ["a", "b", "c"] for start in (0, 3, 6))
    assert PromptSampler(prompts, 7).draw(4, 5) == drawn[4:]


def test_weights_are_honoured():
    drawn = PromptSampler([Prompt(text="a", weight=3), Prompt(text="b", weight=1)], 0).draw(0, 2000)
    assert drawn.count("a") / 2000 == pytest.approx(0.75, abs=0.03)


def test_start_images_are_looked_up_beside_the_file(tmp_path):
    picture = _file(tmp_path, "a.png", b"x")
    rows = [{"text": "a cat", "image": "a.png"}, {"text": "a cat"}, {"text": "a cat", "start_image": str(picture)}, {"prompt": "a dog"}]
    for name, content in (
        ("a.json", json.dumps(rows)),
        ("a.jsonl", "\n".join(map(json.dumps, rows))),
        ("a.csv", "prompt,image\na cat,a.png\na cat,\na dog,\n"),
    ):
        prompts = read_prompt_file(_file(tmp_path, name, content))
        assert [(prompt.text, prompt.image) for prompt in prompts] == [("a cat", str(picture)), ("a cat", ""), ("a dog", "")]
    with pytest.raises(ValueError, match="names the start image 'no.png'"):
        read_prompt_file(_file(tmp_path, "b.json", json.dumps([{"text": "x", "image": "no.png"}])))
    with pytest.raises(ValueError, match="has the image 3"):
        read_prompt_file(_file(tmp_path, "b.json", json.dumps([{"text": "x", "image": 3}])))


def test_the_split_depends_on_texts_and_seed_alone():
    prompts = [Prompt(text=f"prompt {index}") for index in range(40)] + [Prompt(text="prompt 3", image="/a.png")]
    train, held_out = split(prompts, 0.25, 1)
    assert len({prompt.text for prompt in held_out}) == 10 and not {prompt.text for prompt in train} & {prompt.text for prompt in held_out}
    assert {prompt.text for prompt in split(prompts[::-1], 0.25, 1)[1]} == {prompt.text for prompt in held_out}
    assert split(prompts, 0.25, 2)[1] != held_out and split(prompts, 0.0, 1) == (prompts, [])
    assert len(split(prompts[:2], 0.01, 1)[1]) == 1
    for share, message in ((1.0, "below 1"), (0.9, "leaves none")):
        with pytest.raises(ValueError, match=message):
            split(prompts[:1], share, 0)
