"""The command `hf-mm`: draws, edits, captions and converses from a shell, through the same pipelines as from Python.

Knows arguments, files and messages; what a picture or a caption is, the pipelines know. Pictures are described on
standard output, progress and errors go to standard error. Exit codes: 0 done, 1 failed, 2 called wrongly.
"""

import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

    from .cm3leon import CM3LeonPipeline
    from .data.retrieval import Retrieved
    from .transfusion import TransfusionPipeline

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
GENERATE_EXAMPLES = """\b
Examples:
  hf-mm generate "a red star on a white background" --output star.png
  hf-mm generate "a red star" "a blue heart" --num-images 4 --seed 7 --output pictures/shape.png
  hf-mm generate "a red star" --model me/my-transfusion --guidance-scale 3 --num-inference-steps 50
  hf-mm generate "a red star" --model me/my-cm3leon --retrieval-dir runs/retrieval --num-retrieved 2 --json
"""
CAPTION_EXAMPLES = """\b
Examples:
  hf-mm caption star.png
  hf-mm caption pictures/*.jpg --json
  hf-mm caption star.png --model me/my-transfusion --prompt "a picture of"
"""
EDIT_EXAMPLES = """\b
Examples:
  hf-mm edit star.png "make the star blue" --output blue.png
  hf-mm edit star.png "put it on a yellow background" --guidance-scale 3 --image-guidance-scale 1.5 --seed 7
  hf-mm edit edges.png "Make high quality image from canny edge features<image>a red star" --model me/my-cm3leon
"""
CHAT_EXAMPLES = """\b
Examples:
  hf-mm chat --model me/my-transfusion-sft
  hf-mm chat --image star.png --output-dir pictures
  printf '/image star.png\\nwhat is it?\\nmake it blue\\n' | hf-mm chat --json
"""

app = typer.Typer(
    name="hf-mm",
    help="Draw, edit and describe pictures, and talk about them, with early-fusion text and image models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[
    str | None,
    typer.Option(metavar="ID_OR_FOLDER", help="Checkpoint: a Hub id or a folder. Default: one ships with hf_mm."),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings. Read it before.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object a result, for scripts.")]


def check_output(path: Path) -> Path:
    """Refuses a file name whose ending says no kind of picture, before anything is drawn."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise typer.BadParameter(f"{str(path)!r} must end in one of {', '.join(PICTURE_SUFFIXES)}.")
    return path


@app.command(epilog=GENERATE_EXAMPLES)
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to draw.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", callback=check_output, help="Where to. More pictures: star-1.png, star-2.png."),
    ] = Path("picture.png"),
    model: ModelOption = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps, of Transfusion. Default: the model's.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=1, help="How closely to follow the prompt; 1 is off. Default: the model's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the first picture; the next has the next.")] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels. Default: the model's.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the scores of codes, of CM3Leon. Default: the model's.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(max=1, help="Probability that codes are drawn from, of CM3Leon. Default: 1.")
    ] = None,
    retrieval_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of build_retrieval_index.py to retrieve documents from, of CM3Leon. Trust it."),
    ] = None,
    num_retrieved: Annotated[
        int | None, typer.Option(min=0, help="Documents for each prompt. Default: 2 with --retrieval-dir.")
    ] = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Draw pictures from prompts."""
    with one_line_errors():
        import torch

        check_retrieval(retrieval_dir, num_retrieved)
        pipeline = load_pipeline(model, trust_remote_code)
        found = retrieve(pipeline, prompts, retrieval_dir, num_retrieved)
        first_seed = torch.seed() % 2**32 if seed is None else seed
        seeds = range(first_seed, first_seed + len(prompts) * num_images)
        options = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            "temperature": temperature,
            "top_p": top_p,
            "retrieved": None if found is None else found.documents,
        }
        pictures = pipeline(
            prompts,
            **asked_for(options, pipeline),
            num_images_per_prompt=num_images,
            generator=[torch.Generator().manual_seed(number) for number in seeds],
        ).images
        paths = save_pictures(pictures, output)
        for number, path in enumerate(paths):
            prompt = number // num_images
            facts: dict[str, Any] = {"path": str(path), "prompt": prompts[prompt], "seed": seeds[number]}
            if found is not None:
                facts["retrieved"] = describe_retrieved(found, prompt)
            typer.echo(json.dumps(facts) if as_json else f"{path} (seed {seeds[number]})")


@app.command(epilog=CAPTION_EXAMPLES)
def caption(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Picture files, or addresses of some.")],
    model: ModelOption = None,
    prompt: Annotated[str, typer.Option(help="How the text begins, or a question.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest text, in tokens.")] = 64,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Describe pictures."""
    with one_line_errors():
        from .data.formats import open_image

        pictures = [open_image(image, field=image) for image in images]
        pipeline = load_reader(model, trust_remote_code, "describe pictures")
        for image, text in zip(images, pipeline.caption(pictures, prompt, max_new_tokens), strict=True):
            typer.echo(json.dumps({"image": image, "caption": text}) if as_json else f"{image}: {text}")


@app.command(epilog=EDIT_EXAMPLES)
def edit(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Picture file, or the address of one.")],
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="What to change. With <image> in it: a whole prompt of another task."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", callback=check_output, help="Where to.")] = Path(
        "edited.png"
    ),
    model: ModelOption = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps, of Transfusion. Default: the model's.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=1, help="How closely to follow the prompt; 1 is off. Default: the model's.")
    ] = None,
    image_guidance_scale: Annotated[
        float, typer.Option(min=1, help="How closely to follow the picture; 1 is off.")
    ] = 1.0,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the scores of codes, of CM3Leon. Default: the model's.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(max=1, help="Probability that codes are drawn from, of CM3Leon. Default: 1.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the picture.")] = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Change a picture as a prompt says, or draw from one: from its edges, its depth."""
    with one_line_errors():
        import torch

        from .data.formats import open_image

        picture = open_image(image, field=image)
        pipeline = load_reader(model, trust_remote_code, "edit pictures")
        chosen_seed = torch.seed() % 2**32 if seed is None else seed
        options = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "temperature": temperature,
            "top_p": top_p,
        }
        pictures = pipeline(
            prompt,
            picture,
            **asked_for(options, pipeline),
            image_guidance_scale=image_guidance_scale,
            generator=torch.Generator().manual_seed(chosen_seed),
        ).images
        (path,) = save_pictures(pictures, output)
        facts = {"path": str(path), "image": image, "prompt": prompt, "seed": chosen_seed}
        typer.echo(json.dumps(facts) if as_json else f"{path} (seed {chosen_seed})")


@app.command(epilog=CHAT_EXAMPLES)
def chat(
    model: ModelOption = None,
    images: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="IMAGE", help="Picture of the first message; may be repeated."),
    ] = None,
    output_dir: Annotated[Path, typer.Option(file_okay=False, help="Folder of the pictures drawn.")] = Path("."),
    guidance_scale: Annotated[
        float | None, typer.Option(min=1, help="How closely pictures follow the conversation. Default: the model's.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest text, in tokens.")] = 256,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the conversation.")] = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Talk about pictures: a line is a message, /image PATH adds a picture to the next, /quit ends."""
    with one_line_errors():
        import torch

        from .chat import COMMANDS, Conversation, converse, read_lines
        from .data.formats import open_image

        def open_picture(path: str) -> "Image.Image":
            return open_image(path, field=path)

        def complain(error: Exception) -> None:
            if not stdin.isatty():  # a script must not go on as if it had been understood
                raise error
            typer.echo(f"Error: {' '.join(str(error).split())}", err=True)

        pictures = [open_picture(image) for image in images or []]
        pipeline = load_reader(model, trust_remote_code, "hold conversations")
        generator = torch.Generator().manual_seed(torch.seed() % 2**32 if seed is None else seed)
        answer = partial(
            pipeline.chat, guidance_scale=guidance_scale, max_new_tokens=max_new_tokens, generator=generator
        )
        conversation = Conversation(
            answer, open_picture, lambda picture, path: save_pictures([picture], path), output_dir, pictures
        )
        stdin = sys.stdin
        if stdin.isatty():
            typer.echo(f"{COMMANDS}.", err=True)
        lines = read_lines(stdin, lambda: typer.echo("> ", nl=False, err=True))
        converse(conversation, lines, say=typer.echo, complain=complain, as_json=as_json)


def load_reader(model: str | None, trust_remote_code: bool, deed: str) -> "CM3LeonPipeline | TransfusionPipeline":
    """Loads a pipeline that reads pictures, refusing others.

    Args:
        model (`str`, *optional*): As for `load_pipeline`.
        trust_remote_code (`bool`): Likewise.
        deed (`str`): What it is needed for.

    Raises:
        ValueError: If the checkpoint holds another kind of pipeline.
    """
    from .cm3leon import CM3LeonPipeline
    from .transfusion import TransfusionPipeline

    pipeline = load_pipeline(model, trust_remote_code)
    if not isinstance(pipeline, CM3LeonPipeline | TransfusionPipeline):
        raise ValueError(f"--model {model} is a {type(pipeline).__name__}, which does not {deed}.")
    return pipeline


def check_retrieval(retrieval_dir: Path | None, num_retrieved: int | None) -> None:
    """Refuses a missing folder, and a number of documents without one, before anything is loaded."""
    if num_retrieved and retrieval_dir is None:
        raise ValueError(f"--num-retrieved {num_retrieved} needs --retrieval-dir, where to retrieve from.")
    if retrieval_dir is not None and not retrieval_dir.is_dir():
        raise ValueError(
            f"--retrieval-dir {retrieval_dir} is no folder. Make it with recipes/build_retrieval_index.py."
        )


def retrieve(
    pipeline: "DiffusionPipeline", prompts: Sequence[str], retrieval_dir: Path | None, num_retrieved: int | None
) -> "Retrieved | None":
    """Finds documents for prompts.

    Args:
        pipeline (`DiffusionPipeline`): That is to draw by them.
        prompts (`Sequence[str]`): What is drawn.
        retrieval_dir (`Path`, *optional*): Folder of an index.
        num_retrieved (`int`, *optional*): Documents for each; defaults to 2 with a folder.

    Returns:
        [`Retrieved`], or None without a folder or with 0.

    Raises:
        ValueError: If the pipeline draws without documents only, or there is no such index.
    """
    if retrieval_dir is None and num_retrieved is None:
        return None
    if "retrieved" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"--retrieval-dir, --num-retrieved: a {type(pipeline).__name__} does not retrieve.")
    if retrieval_dir is None or num_retrieved == 0:
        return None
    from .cm3leon.retrieval_cm3leon import DEFAULT_NUM_RETRIEVED
    from .data.retrieval_source import open_retriever

    number = DEFAULT_NUM_RETRIEVED if num_retrieved is None else num_retrieved
    return open_retriever(retrieval_dir, pipeline.device).retrieve(prompts, num_retrieved=number)


def describe_retrieved(found: "Retrieved", prompt: int) -> list[dict[str, Any]]:
    """Lists what was retrieved for one prompt: number of the row, relevance, text."""
    from .data.retrieval_vectors import find_text

    facts = zip(found.ids[prompt], found.scores[prompt], found.rows[prompt], strict=True)
    return [{"id": number, "score": round(score, 4), "text": find_text(row)} for number, score, row in facts]


def asked_for(options: Mapping[str, Any], pipeline: "DiffusionPipeline") -> dict[str, Any]:
    """Keeps the options that were given, refusing those that the pipeline of this checkpoint does not have."""
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - inspect.signature(pipeline.__call__).parameters.keys()):
        flags = ", ".join("--" + name.replace("_", "-") for name in unknown)
        raise ValueError(f"{flags}: a {type(pipeline).__name__} has no such option. Leave it out.")
    return given


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns bad input, missing files and unreachable checkpoints into one line on standard error and exit code 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error


def load_pipeline(model: str | None, trust_remote_code: bool) -> "DiffusionPipeline":
    """Loads the pipeline of a checkpoint onto the accelerator, if there is one.

    Args:
        model (`str`, *optional*): Hub id or folder; defaults to the checkpoint that ships with the package.
        trust_remote_code (`bool`): Whether code of the checkpoint may run.

    Returns:
        `DiffusionPipeline`: whose progress bar is shown on terminals only.
    """
    import diffusers
    import torch
    import transformers

    from .text_to_image import DEFAULT_CHECKPOINT

    for library in (transformers, diffusers):  # their bars of loading; those of downloads and of drawing stay
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    name = str(DEFAULT_CHECKPOINT) if model is None else model
    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise ValueError(
            f"--model {name} holds no pipeline: it has no model_index.json. recipes/pretrain.py writes one."
        )
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise OSError(
            f"--model {name} is no folder here, and the Hub has no such model or cannot be reached. Give a folder "
            "that recipes/pretrain.py wrote, or a Hub id."
        ) from error
    pipeline.set_progress_bar_config(disable=None, desc="Drawing")
    return pipeline.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))


def save_pictures(pictures: Sequence["Image.Image"], output: Path) -> list[Path]:
    """Saves pictures, each whole or not at all: the first as `output`, the next with `-1`, `-2` in their names.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): The pictures.
        output (`Path`): Name of the first; its folder is made if missing.

    Returns:
        `list[Path]`: where they are.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    names = [output.name, *(f"{output.stem}-{number}{output.suffix}" for number in range(1, len(pictures)))]
    paths = [output.with_name(name) for name in names]
    for picture, path in zip(pictures, paths, strict=True):
        partial = path.with_name(f".{path.name}.partial{path.suffix}")  # Pillow goes by the ending
        try:
            picture.save(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return paths
