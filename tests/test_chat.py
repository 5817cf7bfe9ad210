import io
from pathlib import Path

import pytest

from hf_mm.chat import Conversation, converse, next_path, read_lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def conversation(tmp_path: Path) -> Conversation:
    """Answers with how many pictures it has seen, and draws one when asked to."""

    def answer(messages: list[dict]) -> dict:
        parts = [part for message in messages for part in message["content"]]
        if parts[-1].get("text") == "fail":
            raise ValueError("no room")
        content = [{"type": "text", "text": f"{len(messages)}: {[part.get('image') for part in parts]}"}]
        drawn = [{"type": "image", "image": "drawn"}] * (parts[-1].get("text") == "draw")
        return {"role": "assistant", "content": content + drawn}

    def open_picture(path: str) -> str:
        if path == "missing":
            raise OSError("no such file")
        return path.upper()

    return Conversation(answer, open_picture, lambda picture, path: path.write_text(picture), tmp_path, ["FIRST"])


def test_every_message_is_answered_with_all_turns_before_it_and_its_own_pictures(conversation, tmp_path):
    said = []
    lines = ["what?", "", "/image a b.png", "/image c.png", "draw", "/image d.png", "", "/quit", "more"]
    converse(conversation, lines, say=said.append, complain=pytest.fail)
    seen = ["'FIRST', None, None", "'A B.PNG', 'C.PNG', None", "None, 'drawn', 'D.PNG'"]
    assert said == [
        "1: ['FIRST', None]",
        f"3: [{seen[0]}, {seen[1]}]\n{tmp_path / 'chat-1.png'}",
        f"5: [{seen[0]}, {seen[1]}, {seen[2]}]",
    ]
    assert (tmp_path / "chat-1.png").read_text() == "drawn"
    assert next_path(tmp_path) == tmp_path / "chat-2.png"


def test_what_failed_is_forgotten_and_the_conversation_goes_on(conversation):
    said, wrong = [], []
    lines = ["/image missing", "/draw", "/image", "fail", "what?"]
    converse(conversation, lines, say=said.append, complain=lambda error: wrong.append(str(error)))
    assert wrong[0] == "no such file" and wrong[1].startswith("There is no command /draw") and wrong[3] == "no room"
    assert said == ["1: ['FIRST', None]"]


def test_only_terminals_are_asked_for_lines():
    for stream, number in ((Terminal("a\nb"), 3), (io.StringIO("a\nb"), 0)):
        asked = []
        assert list(read_lines(stream, lambda asked=asked: asked.append(1))) == ["a", "b"]
        assert len(asked) == number
