"""A conversation in a shell: lines become the user's messages, answers are printed, their pictures saved.

Knows lines, messages and files. How a line is read, a picture opened and an answer given comes as arguments.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO


COMMANDS = "/image PATH adds a picture to the next message, /quit ends"

Message = dict[str, Any]


def read_lines(stream: TextIO, show_prompt: Callable[[], None]) -> Iterator[str]:
    """Reads lines as they come, asking for each on a terminal.

    Args:
        stream (`TextIO`): Where from.
        show_prompt (`Callable`): Called before each line of a terminal.

    Yields:
        `str`: each without its end.
    """
    while True:
        if stream.isatty():
            show_prompt()
        if not (line := stream.readline()):
            return
        yield line.strip()


def next_path(folder: Path) -> Path:
    """Finds the first name of `chat-1.png`, `chat-2.png` and so on that the folder does not have."""
    number = 1
    while (path := folder / f"chat-{number}.png").exists():
        number += 1
    return path


class Conversation:
    """Turns in a shell, from the first line to the last.

    Args:
        answer (`Callable`): Gives the assistant's message to the messages so far, such as `pipe.chat`.
        open_picture (`Callable`): Opens the picture of a path, or raises a `ValueError` or `OSError`.
        save_picture (`Callable`): Saves a picture at a path.
        output_dir (`Path`): Folder of the pictures that are drawn.
        pictures (`Iterable`, *optional*): Of the first message.
    """

    def __init__(
        self,
        answer: Callable[[list[Message]], Message],
        open_picture: Callable[[str], Any],
        save_picture: Callable[[Any, Path], Any],
        output_dir: Path,
        pictures: Iterable[Any] = (),
    ) -> None:
        self.answer, self.open_picture, self.save_picture = answer, open_picture, save_picture
        self.output_dir = output_dir
        self.pictures = list(pictures)
        self.messages: list[Message] = []

    def reply(self, line: str) -> list[dict[str, str]] | None:
        """Takes a line that is no command `/quit`.

        Args:
            line (`str`): A message, or `/image` with a path.

        Returns:
            `list[dict]`: parts of the answer, `{"type": "text", "text": str}` or `{"type": "image", "path": str}`;
            None where there is nothing to answer yet. A message that could not be answered is forgotten.

        Raises:
            ValueError: If there is no such command, or what it needs is missing.
        """
        command, _, rest = line.partition(" ")
        if command == "/image":
            if not rest.strip():
                raise ValueError("/image needs a path: /image star.png")
            self.pictures.append(self.open_picture(rest.strip()))
            return None
        if command.startswith("/"):
            raise ValueError(f"There is no command {command}: {COMMANDS}.")
        if not line and not self.pictures:
            return None
        content = [{"type": "image", "image": picture} for picture in self.pictures]
        asked = [*self.messages, {"role": "user", "content": content + [{"type": "text", "text": line}] * bool(line)}]
        said = self.answer(asked)
        self.messages, self.pictures = [*asked, said], []
        return [self._show(part) for part in said["content"]]

    def _show(self, part: Message) -> dict[str, str]:
        """Saves a part that is a picture; says where it is."""
        if part["type"] == "text":
            return part
        path = next_path(self.output_dir)
        self.save_picture(part["image"], path)
        return {"type": "image", "path": str(path)}


def spell_answer(parts: list[dict[str, str]], as_json: bool) -> str:
    r"""Spells an answer for a terminal, or for a script as one JSON object.

    Args:
        parts (`list[dict]`): From [`Conversation.reply`].
        as_json (`bool`): Which.

    Returns:
        `str`: texts and the paths of pictures, one below the other.

    Example:
        >>> spell_answer([{"type": "text", "text": "here it is"}, {"type": "image", "path": "chat-1.png"}], False)
        'here it is\nchat-1.png'

    """
    if as_json:
        return json.dumps({"role": "assistant", "content": parts})
    return "\n".join(part["text"] if part["type"] == "text" else part["path"] for part in parts)


def converse(
    conversation: Conversation,
    lines: Iterable[str],
    *,
    say: Callable[[str], None],
    complain: Callable[[Exception], None],
    as_json: bool = False,
) -> None:
    """Holds a conversation, up to `/quit` or the last line.

    Args:
        conversation ([`Conversation`]): At its beginning.
        lines (`Iterable[str]`): Of the user.
        say (`Callable`): Prints an answer.
        complain (`Callable`): Takes what is wrong with a line; may raise it, to end there.
        as_json (`bool`, defaults to `False`): Whether answers are printed as JSON.
    """
    for line in lines:
        if line == "/quit":
            return
        try:
            parts = conversation.reply(line)
        except (ValueError, OSError) as error:
            complain(error)
            continue
        if parts is not None:
            say(spell_answer(parts, as_json))
