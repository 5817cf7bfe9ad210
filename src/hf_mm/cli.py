"""The command `hf-mm`: draws, edits, captions, converses and trains from a shell, by the same parts as from Python.

Knows arguments, files and messages; what a picture or a caption is, the pipelines know. Pictures are described on
standard output, progress and errors go to standard error. Exit codes: 0 done, 1 failed, 2 called wrongly.
"""

import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_examples import (
    CAPTION_EXAMPLES,
    CHAT_EXAMPLES,
    DEMO_EXAMPLES,
    EDIT_EXAMPLES,
    GENERATE_EXAMPLES,
    INFO_EXAMPLES,
    TRAIN_EXAMPLES,
)


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from gradio import Blocks
    from PIL import Image

    from .data.retrieval import Retrieved

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

app = typer.Typer(
    name="hf-mm",
    help="Draw, edit and describe pictures, and talk about them, with early-fusion text and image models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

MODEL_HELP = (
    "Hub id or folder of a checkpoint, or one that ships: transfusion-icons (the default), cm3leon-icons, "
    "transfusion-tiny, cm3leon-tiny."
)
ModelOption = Annotated[
    str | None,
    typer.Option(metavar="ID_OR_FOLDER", help=MODEL_HELP),
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

        from .loading import asked_for, load_pipeline, save_pictures

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
        from .loading import load_reader

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
        float | None, typer.Option(min=1, help="How closely to follow the picture; 1 is off. Default: 1.5.")
    ] = None,
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
        from .loading import asked_for, load_reader, save_pictures

        picture = open_image(image, field=image)
        pipeline = load_reader(model, trust_remote_code, "edit pictures")
        chosen_seed = torch.seed() % 2**32 if seed is None else seed
        options = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "image_guidance_scale": image_guidance_scale,
            "temperature": temperature,
            "top_p": top_p,
        }
        pictures = pipeline(
            prompt,
            picture,
            **asked_for(options, pipeline),
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
        from .loading import load_reader, save_pictures

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


@app.command(epilog=INFO_EXAMPLES)
def info(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help=f"{MODEL_HELP} With --plan also a recipe or a model's JSON file."),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Work out memory, time and data of training it instead.")
    ] = False,
    num_gpus: Annotated[int | None, typer.Option(help="Of a plan. Default: 8.")] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Windows in one forward pass on one GPU. Default: 1.")
    ] = None,
    window_length: Annotated[
        int | None, typer.Option(help="Tokens of a window. Default: the recipe's, else the model's positions.")
    ] = None,
    mixed_precision: Annotated[
        str | None, typer.Option(help="bf16, fp16 or no. Default: the recipe's, else bf16.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Compute layers again. Default: the recipe's, else no.")
    ] = None,
    sharding: Annotated[
        str | None, typer.Option(help="fsdp2, or ddp for whole weights on every GPU. Default: fsdp2.")
    ] = None,
    tokens_per_step: Annotated[int | None, typer.Option(help="Of all GPUs. Default: one micro-batch of each.")] = None,
    token_budget: Annotated[float | None, typer.Option(help="Tokens and patches of the whole run.")] = None,
    utilisation: Annotated[float | None, typer.Option(help="Share of the peak that is reached. Default: 0.5.")] = None,
    peak_tflops: Annotated[float | None, typer.Option(help="Of a GPU. Default: 989, an H100 in bf16.")] = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(help="Of a GPU. Default: 80.")] = None,
    storage_gb_per_second: Annotated[
        float | None, typer.Option(help="At which all GPUs together write a checkpoint. Default: 10.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell the sizes, tasks and memory need of a checkpoint, without loading its weights, or plan its training."""
    options = {name: value for name, value in locals().items() if name not in ("model", "plan", "as_json")}
    options = {name: value for name, value in options.items() if value is not None}
    with one_line_errors():
        from .checkpoint_info import describe_checkpoint, spell_checkpoint
        from .loading import find_checkpoint, missing_model

        name = find_checkpoint(model)
        try:
            if plan:
                facts, spell = make_plan(name, options)
            elif options:
                raise ValueError(
                    f"--{next(iter(options)).replace('_', '-')} is of a plan. Add --plan, or leave it out."
                )
            else:
                facts, spell = describe_checkpoint(name), spell_checkpoint
        except OSError as error:
            raise missing_model(f"MODEL {name}", name, error) from error
        typer.echo(json.dumps(facts) if as_json else spell(facts))


def make_plan(name: str, options: dict[str, Any]) -> tuple[dict[str, Any], Callable[..., str]]:
    """Plans the training of a recipe, a model's file or a checkpoint; returns the facts and what spells them."""
    from .evaluation.scaling import count_flops
    from .training_plan import PlanArguments, open_plan, plan_training, spell_plan

    return plan_training(open_plan(name), PlanArguments(**options), count_flops), spell_plan


@app.command(epilog=TRAIN_EXAMPLES)
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", exists=True, dir_okay=False, help="A recipe's YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[-- --FIELD VALUE ...]", help="Fields of the recipe to set.")
    ] = None,
    accelerate_config: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Hardware, as of `accelerate config`. Default: the recipe's."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, and do not run it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train by a recipe: run the script that its first comment names, by accelerate's launcher."""
    with one_line_errors():
        from .recipe_launch import launch, launch_command

        command = launch_command(recipe, overrides or [], accelerate_config)
        typer.echo(json.dumps({"command": command}) if as_json else shlex.join(command), err=not dry_run)
        if not dry_run:
            raise typer.Exit(launch(command))


@app.command(epilog=DEMO_EXAMPLES)
def demo(
    model: ModelOption = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Make a public address for it, through Gradio.")] = False,
    examples: Annotated[
        list[str] | None, typer.Option("--example", metavar="PROMPT", help="Prompt of one click; may be repeated.")
    ] = None,
    retrieval_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of build_retrieval_index.py to retrieve documents from, of CM3Leon. Trust it."),
    ] = None,
    space_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Write a Space that shows the page there, and end.")
    ] = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Draw, caption, edit and converse on a page in the browser."""
    with one_line_errors():
        check_gradio()
        from .demo.space import write_space
        from .hub_upload import list_files

        if space_dir is not None:
            if retrieval_dir is not None:
                raise ValueError("--retrieval-dir: a Space holds no index. Leave it out with --space-dir.")
            write_space(space_dir, model, examples or [], trust_remote_code, list_files)
            typer.echo(json.dumps({"path": str(space_dir)}) if as_json else f"{space_dir} is a Space: upload it.")
            return
        page = build_demo(model, examples, retrieval_dir, trust_remote_code)
        _, address, public = page.launch(server_port=port, share=share, prevent_thread_lock=True, quiet=True)
        typer.echo(json.dumps({"url": address, "share_url": public}) if as_json else public or address)
        page.block_thread()


def build_demo(
    model: str | None = None,
    examples: Sequence[str] | None = None,
    retrieval_dir: Path | None = None,
    trust_remote_code: bool = False,
) -> "Blocks":
    """Loads a checkpoint and builds the page of `hf-mm demo`, which a Space launches too.

    Args:
        model (`str`, *optional*): Hub id or folder; defaults to the checkpoint that ships with the package.
        examples (`Sequence[str]`, *optional*): Prompts of one click; some for the checkpoint that ships.
        retrieval_dir (`Path`, *optional*): Folder of an index.
        trust_remote_code (`bool`, defaults to `False`): Whether code of the checkpoint may run.

    Returns:
        `gradio.Blocks`: to launch.

    Raises:
        ValueError: If Gradio is not installed, or the checkpoint or the index are not what the page needs.
        OSError: If there is no such checkpoint.
    """
    check_gradio()
    from .checkpoint_info import TASKS, read_tasks, read_text
    from .data.formats import open_image
    from .demo.layout import lay_out
    from .demo.page import PROMPTS, DemoPage
    from .loading import find_checkpoint, load_reader

    check_retrieval(retrieval_dir, None)
    pipeline = load_reader(model, trust_remote_code, "caption pictures, as the demo does")
    name = find_checkpoint(model)
    page = DemoPage(
        pipeline,
        Path(name).name if Path(name).is_dir() else name,
        partial(open_image, field="The upload"),
        open_finder(pipeline, retrieval_dir),
        tasks=[task["task"] for task in read_tasks(read_text(name, TASKS) or "")],
        prompts=examples or PROMPTS,
    )
    return lay_out(page)


def check_gradio() -> None:
    """Says how to install what the demo needs, where it is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('The demo needs Gradio: pip install "hf_mm[demo]".')


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
    from .loading import check_retrieves

    check_retrieves(pipeline)
    if retrieval_dir is None or num_retrieved == 0:
        return None
    from .cm3leon.retrieval_cm3leon import DEFAULT_NUM_RETRIEVED
    from .data.retrieval_source import open_retriever

    number = DEFAULT_NUM_RETRIEVED if num_retrieved is None else num_retrieved
    return open_retriever(retrieval_dir, pipeline.device).retrieve(prompts, num_retrieved=number)


def open_finder(
    pipeline: "DiffusionPipeline", retrieval_dir: Path | None
) -> Callable[[str, int], list[dict[str, Any]]] | None:
    """Opens an index for the demo.

    Args:
        pipeline (`DiffusionPipeline`): That is to draw by what is found.
        retrieval_dir (`Path`, *optional*): Folder of the index.

    Returns:
        `Callable`: gives a prompt and a number their documents, best first: `text`, `score`, and `image` or `codes`.
        None without a folder.

    Raises:
        ValueError: As for [`retrieve`].
    """
    if retrieval_dir is None:
        return None
    from .data.retrieval_source import open_retriever
    from .loading import check_retrieves

    check_retrieves(pipeline)

    retriever = open_retriever(retrieval_dir, pipeline.device)

    def find(prompt: str, number: int) -> list[dict[str, Any]]:
        found = retriever.retrieve([prompt], num_retrieved=number)
        return [{**item, "score": score} for item, score in zip(found.documents[0], found.scores[0], strict=True)]

    return find


def describe_retrieved(found: "Retrieved", prompt: int) -> list[dict[str, Any]]:
    """Lists what was retrieved for one prompt: number of the row, relevance, text."""
    from .data.retrieval_vectors import find_text

    facts = zip(found.ids[prompt], found.scores[prompt], found.rows[prompt], strict=True)
    return [{"id": number, "score": round(score, 4), "text": find_text(row)} for number, score, row in facts]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns bad input, missing files and unreachable checkpoints into one line on standard error and exit code 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error
