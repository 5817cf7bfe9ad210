"""A `VQModel` whose latents are patches of pixels: its encoder cuts pictures, its decoder puts them together again.

Nothing in it is trained. Knows the layers of diffusers' autoencoders. Does not know which patches have codes.
"""

import torch
from diffusers import VQModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


_GROUPS = 4  # of every norm
_LEVEL = 2048.0  # of constant channels, beside which values, of some dozens, hardly change a group's deviation
_LIFT = 16.0  # SiLU leaves what lies so high as it is, and nothing of what lies as low
_MAX_SIZE = 64  # counts of more pixels would weigh down their group below what SiLU leaves as it is
_PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))  # row and column of a pixel within four
_CENTER, _LEFT, _ABOVE = (1, 1), (1, 0), (0, 1)  # weights of a 3 x 3 convolution


# Axes: C channels; values lie in some of them, constants in the others.
@torch.no_grad()
def build_patch_autoencoder(patch_size: int, image_size: int, num_codes: int) -> VQModel:
    """Builds a `VQModel` that decodes a code as the pixels that it holds, to 0.03 of [-1, 1]; codes are random.

    A trained encoder writes about an object all around it, already because its norms look at whole pictures, and small
    models read such codes slowly. Here constants outweigh values in every norm, and values that are read again are
    freed of what their group's mean has added. The decoder repeats a latent pixel four times, as that of every
    autoencoder of diffusers does, and knows which of the four it is at by the numbers of rows and columns, which it
    counts from the edges, where convolutions read zeros. Not in the papers; ours.

    Args:
        patch_size (`int`): Pixels of a patch's side, a power of two from 2 on.
        image_size (`int`): Pixels of a picture's side, a multiple of `patch_size`, 64 at most: counts of more outweigh
            values. Smaller pictures do as well.
        num_codes (`int`): Codes of the codebook.

    Returns:
        `VQModel`: Its latents have a channel for each value of a patch, colour by colour.

    Raises:
        ValueError: If the sizes do not fit each other.

    """
    if patch_size < 2 or patch_size & (patch_size - 1):
        raise ValueError(f"`patch_size`={patch_size} must be a power of two, from 2 on.")
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(f"`image_size`={image_size} must be a multiple of `patch_size`={patch_size}.")
    if image_size > _MAX_SIZE:
        raise ValueError(f"`image_size`={image_size} must be at most {_MAX_SIZE}: patches are for small pictures.")
    num_levels = patch_size.bit_length()
    vq = VQModel(
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=_find_widths(num_levels),
        # A residual block counts two rows further, and the decoder has three more of them at this size.
        layers_per_block=max(1, -(-(image_size // patch_size - 1) // 2) - 3),
        latent_channels=3 * patch_size**2,
        sample_size=image_size,
        num_vq_embeddings=num_codes,
        norm_num_groups=_GROUPS,
        mid_block_add_attention=False,
        force_upcast=True,  # constants and values together need more digits than bfloat16 or TF32 have
    )
    for layer in vq.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)  # so that residual blocks are what they are added to
            nn.init.zeros_(layer.bias)
    _set_encoder(vq)
    _set_decoder(vq)
    return vq


def _find_widths(num_levels: int) -> tuple[int, ...]:
    """Finds channels of each level: three in four are for values, and four values of a group make one."""
    step = 8 * _GROUPS
    widths: list[int] = []
    for level in range(num_levels):
        num_values = 3 * 4**level
        per_group = -(-4 * num_values // _GROUPS) if level < num_levels - 1 else -(-(num_values + 4) // _GROUPS)
        width = -(-_GROUPS * per_group * 4 // 3 // step) * step
        widths.append(max(width, widths[-1] + step) if widths else width)  # each level's first block is a wider one
    return tuple(widths)


def _set_encoder(vq: VQModel) -> None:
    encoder, num_values = vq.encoder, 3
    encoder.conv_in.weight[range(3), range(3), 1, 1] = 1
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                resnet.conv_shortcut.weight[range(num_values), range(num_values)] = 1
        for sampler in block.downsamplers or ():
            for place, (row, column) in enumerate(_PLACES):
                sampler.conv.weight[range(place, 4 * num_values, 4), range(num_values), row, column] = 1
            num_values *= 4
    widest = encoder.down_blocks[-1].resnets[0].conv_shortcut
    slots = _find_slots(widest.out_channels)[:num_values]
    nn.init.zeros_(widest.weight)
    widest.weight[slots, range(num_values)] = 1
    _add_constants(widest)
    _set_norm(encoder.conv_norm_out)
    for value, slot in enumerate(slots):
        _read(encoder.conv_out, value, slot)
    vq.quant_conv.weight[range(num_values), range(num_values)] = 1


def _set_decoder(vq: VQModel) -> None:
    decoder, num_values = vq.decoder, vq.config.latent_channels
    vq.post_quant_conv.weight[range(num_values), range(num_values)] = 1
    slots = _find_slots(decoder.conv_in.out_channels)
    column, row = slots[num_values : num_values + 2]
    decoder.conv_in.weight[slots[:num_values], range(num_values), 1, 1] = 1
    decoder.conv_in.bias[[column, row]] = 1
    _add_constants(decoder.conv_in)
    for resnet in (*decoder.mid_block.resnets, *decoder.up_blocks[0].resnets):
        _count_places(resnet, column, row)
    for number, block in enumerate(decoder.up_blocks):
        if number > 0:
            num_values //= 4
            _choose_values(block.resnets[0], num_values)
        for sampler in block.upsamplers or ():
            _tell_places(sampler.conv, num_values)
    _set_norm(decoder.conv_norm_out)
    for value, slot in enumerate(_find_slots(decoder.conv_out.in_channels)[:3]):
        _read(decoder.conv_out, value, slot)


def _count_places(resnet: ResnetBlock2D, column: int, row: int) -> None:
    """Lets the numbers of columns and rows, from 1 on, be right two further from the left and upper edge."""
    _set_norm(resnet.norm1)
    _set_norm(resnet.norm2)
    _add_constants(resnet.conv1)
    slots = iter(_find_slots(resnet.conv1.out_channels))
    for counted, before in ((column, _LEFT), (row, _ABOVE)):
        further, copy = next(slots), next(slots)
        resnet.conv1.bias[further] = resnet.conv2.bias[counted] = 1
        _read(resnet.conv1, further, counted, before)
        _read(resnet.conv1, copy, counted)
        _read(resnet.conv2, counted, further, before)
        _read(resnet.conv2, counted, copy, factor=-1.0)


def _tell_places(conv: nn.Conv2d, num_values: int) -> None:
    """Numbers the columns and rows of what was repeated, and tells which is the first of two."""
    slots = _find_slots(conv.out_channels)
    column, row, is_left, is_upper = slots[num_values : num_values + 4]
    conv.weight[slots[:num_values], slots[:num_values], 1, 1] = 1
    for number, is_first, before in ((column, is_left, _LEFT), (row, is_upper, _ABOVE)):
        conv.weight[number, number][_CENTER] = conv.weight[number, number][before] = 1  # 1 + 0, 1 + 1, 2 + 1, 2 + 2
        conv.weight[is_first, number][_CENTER], conv.weight[is_first, number][before] = 1, -1
    _add_constants(conv)


def _choose_values(resnet: ResnetBlock2D, num_values: int) -> None:
    """Takes those of four times as many values that belong to a pixel's place among four.

    The others are pressed down so far that SiLU leaves nothing of them. A value's four are in one group, so that one
    mean is taken off them.
    """
    sources, targets = _find_slots(resnet.conv1.in_channels), _find_slots(resnet.conv1.out_channels)
    column, row, is_left, is_upper = sources[4 * num_values : 4 * num_values + 4]
    width = resnet.conv1.out_channels // _GROUPS
    per_group = (width - width // 4) // 4
    _set_norm(resnet.norm1)
    _set_norm(resnet.norm2)
    pressure = 2 * _LIFT
    for value in range(num_values):
        first = value // per_group * width
        gates = range(first + width // 4 + 4 * (value % per_group), first + width)[:4]
        for place, (gate, (lower, right)) in enumerate(zip(gates, _PLACES, strict=True)):
            _read(resnet.conv1, gate, sources[4 * value + place])
            _read(resnet.conv1, gate, is_left, factor=-pressure if right else pressure)
            _read(resnet.conv1, gate, is_upper, factor=-pressure if lower else pressure)
            resnet.conv1.bias[gate] = -pressure * ((not right) + (not lower))
        resnet.conv2.weight[targets[value], gates, 1, 1] = 1
        resnet.conv2.weight[targets[value], [first, first + 1], 1, 1] = -0.5
        in_group = min(per_group, num_values - value // per_group * per_group)
        mean = 4 * in_group * pressure / width  # by which a group lies lower for what is pressed down in it
        resnet.norm2.bias[gates] = _LIFT - mean
        resnet.conv2.bias[targets[value]] = mean  # which the constants that are taken off have besides
    _add_constants(resnet.conv1)
    if num_values > 3:  # of the last level nothing counts
        resnet.conv_shortcut.weight[targets[num_values : num_values + 2], [column, row]] = 1
    _add_constants(resnet.conv_shortcut)


def _find_slots(num_channels: int) -> list[int]:
    """Lists the channels of values: in each group those behind a quarter of constants."""
    width = num_channels // _GROUPS
    return [channel for channel in range(num_channels) if channel % width >= width // 4]


def _add_constants(conv: nn.Conv2d) -> None:
    """Lets a quarter of each group be constants, by turns above and below 0."""
    groups = conv.bias.view(_GROUPS, -1)
    quarter = groups.shape[1] // 4
    groups[:, 0:quarter:2], groups[:, 1:quarter:2] = _LEVEL, -_LEVEL


def _set_norm(norm: nn.GroupNorm) -> None:
    """Lets a norm take off means and lift what is left, constants too, whose deviation is half of them."""
    nn.init.constant_(norm.weight, _LEVEL / 2)
    nn.init.constant_(norm.bias, _LIFT)
    groups = norm.bias.view(_GROUPS, -1)
    quarter = groups.shape[1] // 4
    groups[:, 0:quarter:2] -= _LEVEL
    groups[:, 1:quarter:2] += _LEVEL


def _read(conv: nn.Conv2d, target: int, source: int, place: tuple[int, int] = _CENTER, *, factor: float = 1.0) -> None:
    """Adds a value behind norm and SiLU to what a convolution writes, without lift and without its group's mean.

    Two constants of its group have both, and beside an edge all of them are 0.
    """
    width = conv.in_channels // _GROUPS
    first = source // width * width
    for channel, weight in ((source, factor), (first, -factor / 2), (first + 1, -factor / 2)):
        conv.weight[target, channel][place] += weight
