"""The token operator on the CPU: splat weights summed to tokens and regions while they are composited.

The teacher's path is a product of sparse matrices, `D B S U` (pooling, blending, splatting, upsampling), and S has one
entry per hit: tens of millions. Here no hit is ever stored. While a Gaussian is composited over its box of pixels
(`splatting/hits.py`), its weights are summed to the target tokens and to the target regions that the box overlaps, and
each of these few masses is passed on to the four context tokens from which the Gaussian's feature is interpolated:

    A[t, k] = sum_u D[t, u] sum_g S[u, g] U[g, k]        for target tokens t and context tokens k
    G[r, k] = sum_{u in r}  sum_g S[u, g] U[g, k]        for target regions r

Every tile sums for itself, in double precision, and the tiles' sums are added in the order of the tiles: the result's
bits do not depend on the number of threads.
"""

from typing import NamedTuple, no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int

from snd_nerfstudio.splatting.hits import (
    LANES,
    Footprints,
    Tiles,
    compiled,
    compositing_constants,
    depth_bits,
    front_to_back,
    weigh_box,
)

TILE = 64
"""Side of a tile, pixels: its transmittances fit the L1 cache, and few Gaussians overlap two tiles."""
STRIDE = TILE + LANES
"""Pixels between rows of a tile's transmittances: the last 16 may be read and written, but belong to no pixel."""
CORNERS = 4
"""Context tokens from which a pixel's feature is interpolated."""
STREAMS = 6
"""Masses noted beside a Gaussian: two regions, two by two tokens."""
PACKED = 16
"""Numbers of a Gaussian that compositing reads: 64 bytes, a cache line, in float32."""
CHECK_EVERY = 1024
"""Gaussians of a tile between looks at whether all its pixels are finished."""
FIRST_CAPACITY = 2048
"""Sums per tile that there is room for at first; twice as many after each tile that needed more."""


class Interpolation(NamedTuple):
    """Each Gaussian as a weighted sum of four context tokens: `base + offsets`."""

    base: Int[np.ndarray, "n"]
    """int32, row-major over (view, row, column) of the tokens."""
    weights: Float[np.ndarray, "n 4"]
    offsets: Int[np.ndarray, "4"]
    """int64: (0, 1, w, w + 1), or less where the grid has a single row or column."""


class Axis(NamedTuple):
    """Pooling along one axis: the pixels of token t are `begin[t] <= u < end[t]`."""

    begin: Int[np.ndarray, "tokens"]
    """int64."""
    end: Int[np.ndarray, "tokens"]
    """int64."""
    weights: Float[np.ndarray, "tokens longest"]
    """Of the token's pixels, from its first one on."""
    first: Int[np.ndarray, "pixels"]
    """The first token whose pixels end after this one, int64."""


class Regions(NamedTuple):
    """The target's instance regions."""

    labels: Int[np.ndarray, "H W"]
    """int32, below `count`."""
    reach: Int[np.ndarray, "H W"]
    """uint8: side of the largest square of one label with its upper left corner here, at most 255."""
    count: int


class Sums(NamedTuple):
    """Rows of a sparse matrix."""

    starts: Int[np.ndarray, "rows_and_1"]
    """int64."""
    columns: Int[np.ndarray, "entries"]
    """int32, ascending within a row."""
    values: Float[np.ndarray, "entries"]
    """float64."""


def sum_weights(
    footprints: Footprints,
    tiles: Tiles,
    interpolation: Interpolation,
    rows: Axis,
    columns: Axis,
    regions: Regions | None,
    context_tokens: int,
) -> tuple[Sums, Float[np.ndarray, "H W"]]:
    """Composite all Gaussians into sums over tokens and regions.

    The caller holds `engine_lock`.

    Args:
        footprints: of all Gaussians in the target view.
        tiles: the Gaussians of each tile of `TILE` pixels.
        interpolation: of each Gaussian's feature.
        rows: pooling of rows.
        columns: pooling of columns.
        regions: of the target view, or None to sum over tokens alone.
        context_tokens: how many there are.

    Returns:
        A (a row per target token) with G (a row per region) below it, over the context tokens; and accumulated alpha.
    """
    dtype = footprints.records.dtype
    height, width = rows.first.size, columns.first.size
    labels, reach, count = (
        Regions(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.uint8), 0) if regions is None else regions
    )
    alpha = np.empty((height, width), dtype)
    tokens = rows.begin.size * columns.begin.size
    labels = np.pad(labels, ((0, 0), (0, LANES)))
    padded = np.pad(columns.weights, ((0, 0), (LANES, LANES)))
    capacity = FIRST_CAPACITY
    while True:
        found = np.zeros(len(tiles.starts) - 1, np.int64)
        keys = np.empty((len(found), capacity), np.int64)
        sums = np.empty((len(found), capacity, CORNERS), np.float64)
        with numba.parallel_chunksize(1):
            _sum_tiles(
                *tiles, _largest_first(tiles), footprints.records, depth_bits(footprints), footprints.boxes,
                *interpolation[:2], rows.begin, rows.end, rows.weights.reshape(-1), rows.first, _even(rows),
                columns.begin, columns.end, padded.reshape(-1), columns.first, labels.reshape(-1), labels.shape[1],
                reach, count > 0, context_tokens, compositing_constants(dtype), alpha, keys, sums, found,
            )  # fmt: skip
        if (found <= capacity).all():
            break
        capacity *= 2
    starts, entry_columns, values = _merge(
        keys, sums, found, interpolation.offsets, tokens + count, context_tokens, numba.get_num_threads() * 4
    )
    return Sums(starts, entry_columns, values), alpha


def _largest_first(tiles: Tiles) -> Int[np.ndarray, "tiles"]:
    """Tiles with many Gaussians first, so that no thread is left with a large one at the end."""
    return np.argsort(-np.diff(tiles.starts), kind="stable")


def _even(axis: Axis) -> Int[np.ndarray, "pixels"]:
    """The end of the run of pixels that belong, as each one does, to the same single token with the same weight."""
    pixels = axis.first.size
    owners, ends = np.zeros(pixels, np.int64), np.arange(pixels) + 1
    shares = np.zeros(pixels, axis.weights.dtype)
    for begin, end, weights in zip(axis.begin, axis.end, axis.weights, strict=True):
        owners[begin:end] += 1
        shares[begin:end] = weights[: end - begin]
    for pixel in range(pixels - 2, -1, -1):
        same = owners[pixel] == owners[pixel + 1] == 1 and axis.first[pixel] == axis.first[pixel + 1]
        if same and shares[pixel] == shares[pixel + 1]:
            ends[pixel] = ends[pixel + 1]
    return ends


@compiled(parallel=True)
@no_type_check
def _sum_tiles(
    tile_starts, tile_gaussians, tile_order, records, bits, boxes, bases, corner_weights,
    row_begin, row_end, row_weights, first_row, even_rows, column_begin, column_end, padded_columns, first_column,
    labels, labels_width, reach, with_regions, context_tokens, constants, alpha, keys, sums, found,
):  # fmt: skip
    height, width = alpha.shape
    tiles_across = (width + TILE - 1) // TILE
    capacity = keys.shape[1]
    table_bits = np.int64(4)
    while (1 << table_bits) < 4 * capacity:
        table_bits += 1
    for place in numba.prange(tile_order.size):
        tile = tile_order[place]
        first_y, first_x = tile // tiles_across * TILE, tile % tiles_across * TILE
        end_y, end_x = min(first_y + TILE, height), min(first_x + TILE, width)
        transmittance = np.ones(TILE * STRIDE, records.dtype)
        weights = np.empty(TILE * LANES, records.dtype)
        line, first_line = np.empty(LANES, records.dtype), np.empty(LANES, records.dtype)
        second_line, rest_line = np.empty(LANES, records.dtype), np.empty(LANES, records.dtype)
        table = np.full(1 << table_bits, -1, np.int32)
        members = tile_gaussians[tile_starts[tile] : tile_starts[tile + 1]]
        packed, order = _pack_members(members, records, bits, boxes, bases, corner_weights)
        found[tile] = _sum_tile(
            packed, order, row_begin, row_end, row_weights, first_row, even_rows, column_begin, column_end,
            padded_columns, first_column, labels, labels_width, reach, with_regions, context_tokens, constants,
            first_y, first_x, end_y, end_x, transmittance, weights, line, first_line, second_line, rest_line, table,
            64 - table_bits, keys[tile], sums[tile],
        )  # fmt: skip
        for y in range(first_y, end_y):
            for x in range(first_x, end_x):
                alpha[y, x] = constants[4] - abs(transmittance[(y - first_y) * STRIDE + x - first_x])


@compiled()
@no_type_check
def _pack_members(members, records, bits, boxes, bases, corner_weights):
    """All that compositing a tile reads of its Gaussians, side by side, and the order of their depths.

    It is copied in order of index, which is nearly the order in memory; in order of depth every read would miss.
    """
    packed = np.empty((members.size, PACKED), records.dtype)
    keys = np.empty(members.size, bits.dtype)
    for i in range(members.size):
        g = members[i]
        for column in range(7):
            packed[i, column] = records[g, column]
        keys[i] = bits[g, 7]
        for side in range(4):
            packed[i, 7 + side] = boxes[g, side]
        packed[i, 11] = bases[g]
        for corner in range(CORNERS):
            packed[i, 12 + corner] = corner_weights[g, corner]
    return packed, front_to_back(keys)


@compiled()
@no_type_check
def _sum_tile(
    packed, order, row_begin, row_end, row_weights, first_row, even_rows, column_begin, column_end, padded_columns,
    first_column, labels, labels_width, reach, with_regions, context_tokens, constants, first_y, first_x, end_y, end_x,
    transmittance, weights, line, first_line, second_line, rest_line, table, shift, keys, sums,
):  # fmt: skip
    """Composite one tile; return the number of sums, or more than there is room for.

    Masses that most Gaussians have, one or two regions and up to 2 x 2 tokens, are noted beside the Gaussian and passed
    on afterwards, in order of index: neighbours then share regions and tokens, and few sums are looked up.
    """
    stride = np.uint64(STRIDE)
    token_rows, token_columns = row_begin.size, column_begin.size
    longest_row, longest_column = row_weights.size // token_rows, padded_columns.size // token_columns
    region_row = token_rows * token_columns
    rows_of = np.full((order.size, STREAMS), -1, np.int32)
    masses = np.empty((order.size, STREAMS), packed.dtype)
    width_of_labels = np.uint64(labels_width)
    used = 0
    for number in range(order.size):
        if number % CHECK_EVERY == CHECK_EVERY - 1 and _all_finished(transmittance, end_y - first_y, end_x - first_x):
            break
        m = np.uint64(order[number])
        low_y, high_y = max(np.int64(packed[m, 8]), first_y), min(np.int64(packed[m, 10]), end_y)
        start_x, box_end = max(np.int64(packed[m, 7]), first_x), min(np.int64(packed[m, 9]), end_x)
        rows = high_y - low_y
        narrow = box_end - start_x <= LANES
        for low_x in range(start_x, box_end, LANES):
            high_x = min(low_x + LANES, box_end)
            place = np.uint64(low_y - first_y) * stride + np.uint64(low_x - first_x)
            weigh_box(
                transmittance, stride, place, weights, line, low_x, low_y, high_x - low_x, rows, packed[m, 0],
                packed[m, 1], packed[m, 2], packed[m, 3], packed[m, 4], packed[m, 5], packed[m, 6], constants,
            )  # fmt: skip
            if with_regions:
                corner = np.uint64(low_y) * width_of_labels + np.uint64(low_x)
                below, right = np.uint64(rows - 1) * width_of_labels, np.uint64(high_x - low_x - 1)
                first = labels[corner]
                noted = narrow
                if reach[low_y, low_x] >= max(rows, high_x - low_x):
                    if narrow:
                        rows_of[m, 0], masses[m, 0] = region_row + first, _total(line)
                else:
                    second = labels[corner + below + right]
                    second = second if second != first else labels[corner + right]
                    second = second if second != first else labels[corner + below]
                    _sum_rows_of_two(
                        weights,
                        labels,
                        corner,
                        width_of_labels,
                        rows,
                        first,
                        second,
                        first_line,
                        second_line,
                        rest_line,
                    )
                    noted = narrow and not _total(rest_line) > 0
                    if noted:
                        rows_of[m, 0], masses[m, 0] = region_row + first, _total(first_line)
                        if second != first:
                            rows_of[m, 1], masses[m, 1] = region_row + second, _total(second_line)
                if not noted:
                    used = _add_regions(
                        table, shift, keys, sums, used, labels, corner, width_of_labels, rows, high_x - low_x, weights,
                        region_row, context_tokens, packed, m,
                    )  # fmt: skip
            first_token = first_column[low_x]
            if first_token < token_columns and column_begin[first_token] < high_x:
                first_token_row = first_row[low_y]
                token_row = first_token_row
                while token_row < token_rows and row_begin[token_row] < high_y:
                    start, share = max(row_begin[token_row], low_y), constants[4]
                    if high_y <= even_rows[low_y] and row_begin[token_row] <= low_y:
                        share = row_weights[token_row * longest_row + low_y - row_begin[token_row]]
                        sums_of_rows = line
                    else:
                        sums_of_rows = first_line
                        _sum_weighted_rows(
                            weights, start - low_y, row_weights, token_row * longest_row + start
                            - row_begin[token_row], min(row_end[token_row], high_y) - start, first_line,
                        )  # fmt: skip
                    token = first_token
                    while token < token_columns and column_begin[token] < high_x:
                        mass = share * _weighted_total(
                            sums_of_rows, padded_columns, token * longest_column + LANES + low_x - column_begin[token]
                        )
                        row, stream = (
                            token_row * token_columns + token,
                            2 * (token_row - first_token_row) + token - first_token,
                        )
                        if narrow and token_row - first_token_row < 2 and token - first_token < 2:
                            rows_of[m, 2 + stream], masses[m, 2 + stream] = row, mass
                        else:
                            used = _add(table, shift, keys, sums, used, row, context_tokens, packed, m, mass)
                        token += 1
                    token_row += 1
            if used > keys.size:
                return used
    for stream in range(0 if with_regions else 2, STREAMS):
        used = _add_stream(table, shift, keys, sums, used, rows_of, masses, stream, context_tokens, packed)
    return used


@compiled()
@no_type_check
def _add_stream(table, shift, keys, sums, used, rows_of, masses, stream, context_tokens, packed):
    """Pass on the masses noted in one column; those of neighbours with one row and one base are added up first."""
    last = np.int64(-1)
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    for i in range(rows_of.shape[0]):
        m = np.uint64(i)
        row = rows_of[m, stream]
        if row < 0 or not masses[m, stream] > 0:
            continue
        key = np.int64(row) * context_tokens + np.int64(packed[m, 11])
        if key != last:
            if last >= 0:
                used = _add_four(table, shift, keys, sums, used, last, a, b, c, d)
            last = key
            a, b, c, d = 0.0, 0.0, 0.0, 0.0
        mass = np.float64(masses[m, stream])
        a += mass * np.float64(packed[m, 12])
        b += mass * np.float64(packed[m, 13])
        c += mass * np.float64(packed[m, 14])
        d += mass * np.float64(packed[m, 15])
    if last >= 0:
        used = _add_four(table, shift, keys, sums, used, last, a, b, c, d)
    return used


@compiled()
@no_type_check
def _add_regions(
    table, shift, keys, sums, used, labels, corner, labels_width, rows, columns, weights, region_row, context_tokens,
    packed, m,
):  # fmt: skip
    """Pass on a box's weights to any number of regions, run by run of pixels of one region."""
    for row in range(rows):
        place = corner + np.uint64(row) * labels_width
        x, lane = 0, row * LANES
        while x < columns:
            label, mass = labels[place + np.uint64(x)], weights[lane]
            x, lane = x + 1, lane + 1
            while x < columns and labels[place + np.uint64(x)] == label:
                mass += weights[lane]
                x, lane = x + 1, lane + 1
            used = _add(table, shift, keys, sums, used, region_row + label, context_tokens, packed, m, mass)
    return used


@compiled()
@no_type_check
def _all_finished(transmittance, rows, columns):
    for y in range(rows):
        for x in range(columns):
            if transmittance[y * STRIDE + x] > 0:
                return False
    return True


@compiled()
@no_type_check
def _sum_weighted_rows(weights, first, factors, first_factor, count, line):
    """`line = sum_i factors[first_factor + i] weights[first + i]` for i below count."""
    for lane in range(LANES):
        line[lane] = 0
    for row in range(count):
        factor = factors[np.uint64(first_factor + row)]
        start = np.uint64(first + row) * np.uint64(LANES)
        for lane in range(LANES):
            line[lane] += factor * weights[start + np.uint64(lane)]


@compiled(fastmath={"reassoc"})
@no_type_check
def _total(line):
    total = line[0] - line[0]
    for lane in range(LANES):
        total += line[lane]
    return total


@compiled(fastmath={"reassoc"})
@no_type_check
def _weighted_total(line, factors, first_factor):
    """`sum_i factors[first_factor + i] line[i]`."""
    total = line[0] - line[0]
    start = np.uint64(first_factor)
    for lane in range(LANES):
        total += factors[start + np.uint64(lane)] * line[lane]
    return total


@compiled()
@no_type_check
def _sum_rows_of_two(weights, labels, start, labels_width, rows, first, second, first_line, second_line, rest_line):
    """Sums over the rows of the pixels with one label, with another, and with neither."""
    zero = weights[0] - weights[0]
    for lane in range(LANES):
        first_line[lane] = zero
        second_line[lane] = zero
        rest_line[lane] = zero
    for row in range(rows):
        place, noted = start + np.uint64(row) * labels_width, np.uint64(row) * np.uint64(LANES)
        for lane in range(LANES):
            label, weight = labels[place + np.uint64(lane)], weights[noted + np.uint64(lane)]
            in_first, in_second = label == first, label == second
            first_line[lane] += weight if in_first else zero
            second_line[lane] += weight if in_second else zero
            rest_line[lane] += zero if in_first | in_second else weight


@compiled()
@no_type_check
def _add(table, shift, keys, sums, used, row, context_tokens, packed, m, mass):
    """`sums[row, base] += mass * corners` of one Gaussian; return the number of sums."""
    if not mass > 0:
        return used
    precise = np.float64(mass)
    return _add_four(
        table, shift, keys, sums, used, np.int64(row) * context_tokens + np.int64(packed[m, 11]),
        precise * packed[m, 12], precise * packed[m, 13], precise * packed[m, 14], precise * packed[m, 15],
    )  # fmt: skip


@compiled()
@no_type_check
def _add_four(table, shift, keys, sums, used, key, a, b, c, d):
    """`sums[key] += (a, b, c, d)` in a hash table; return the number of sums, or more than there is room for."""
    if used > keys.size:
        return used
    slot = (np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(shift)
    entry = table[slot]
    while entry >= 0 and keys[np.uint64(entry)] != key:
        slot = (slot + np.uint64(1)) & np.uint64(table.size - 1)
        entry = table[slot]
    if entry < 0:
        if used == keys.size:
            return used + 1
        entry = used
        used += 1
        table[slot] = entry
        keys[entry] = key
        for corner in range(CORNERS):
            sums[entry, corner] = 0
    at = np.uint64(entry)
    sums[at, 0] += a
    sums[at, 1] += b
    sums[at, 2] += c
    sums[at, 3] += d
    return used


@compiled(parallel=True)
@no_type_check
def _merge(keys, sums, found, offsets, rows, columns, chunks):
    """Add up the tiles' sums, in their order, to the rows of a sparse matrix."""
    sizes = np.zeros(rows + 1, np.int64)
    for tile in range(found.size):
        for i in range(found[tile]):
            sizes[keys[tile, i] // columns + 1] += 1
    places = np.cumsum(sizes)
    order = np.empty((places[-1], 2), np.int32)
    cursors = places[:-1].copy()
    for tile in range(found.size):
        for i in range(found[tile]):
            row = keys[tile, i] // columns
            order[cursors[row], 0], order[cursors[row], 1] = tile, i
            cursors[row] += 1
    counts = np.zeros(rows + 1, np.int64)
    merged_columns = np.empty(CORNERS * places[-1], np.int32)
    merged_values = np.empty(CORNERS * places[-1], np.float64)
    for chunk in numba.prange(chunks):
        total = np.zeros(columns, np.float64)
        touched = np.empty(columns, np.int32)
        for row in range(chunk * rows // chunks, (chunk + 1) * rows // chunks):
            count = 0
            for place in range(places[row], places[row + 1]):
                tile, i = order[place]
                base = keys[tile, i] % columns
                for corner in range(CORNERS):
                    value = sums[tile, i, corner]
                    if value > 0:
                        column = base + offsets[corner]
                        if total[column] == 0:
                            touched[count] = column
                            count += 1
                        total[column] += value
            names = np.sort(touched[:count])
            for j in range(count):
                merged_columns[CORNERS * places[row] + j] = names[j]
                merged_values[CORNERS * places[row] + j] = total[names[j]]
                total[names[j]] = 0
            counts[row + 1] = count
    starts = np.cumsum(counts)
    final_columns = np.empty(starts[-1], np.int32)
    final_values = np.empty(starts[-1], np.float64)
    for row in range(rows):
        for j in range(counts[row + 1]):
            final_columns[starts[row] + j] = merged_columns[CORNERS * places[row] + j]
            final_values[starts[row] + j] = merged_values[CORNERS * places[row] + j]
    return starts, final_columns, final_values


# ---------------------------------------------------------------------- what the sums need


@compiled()
@no_type_check
def uniform_reach(labels):
    """`Regions.reach` of a label map, by dynamic programming from the lower right."""
    height, width = labels.shape
    reach = np.ones((height, width), np.uint8)
    for y in range(height - 2, -1, -1):
        for x in range(width - 2, -1, -1):
            label = labels[y, x]
            if labels[y, x + 1] == label and labels[y + 1, x] == label and labels[y + 1, x + 1] == label:
                smallest = min(reach[y, x + 1], reach[y + 1, x], reach[y + 1, x + 1])
                reach[y, x] = min(np.int64(smallest) + 1, 255)
    return reach


@compiled(parallel=True)
@no_type_check
def region_shares(
    row_begin, row_end, row_weights, column_begin, column_end, column_weights, labels, count, mass, chunks
):
    """`Q[t, r] = sum_{u in r} D[t, u] mass[u]` as sparse rows: starts, columns, float64 values."""
    token_rows, token_columns = row_begin.size, column_begin.size
    rows = token_rows * token_columns
    widest = 0
    for token_row in range(token_rows):
        widest = max(widest, row_end[token_row] - row_begin[token_row])
    for token in range(token_columns):
        widest = max(widest, column_end[token] - column_begin[token])
    most = min(count, widest * widest)
    found = np.empty((rows, most), np.int32)
    values = np.empty((rows, most), np.float64)
    counts = np.zeros(rows + 1, np.int64)
    for chunk in numba.prange(chunks):
        total = np.zeros(count, np.float64)
        for t in range(chunk * rows // chunks, (chunk + 1) * rows // chunks):
            token_row, token = t // token_columns, t % token_columns
            touched = 0
            for y in range(row_begin[token_row], row_end[token_row]):
                for x in range(column_begin[token], column_end[token]):
                    share = np.float64(row_weights[token_row, y - row_begin[token_row]])
                    share *= np.float64(column_weights[token, x - column_begin[token]]) * np.float64(mass[y, x])
                    if share > 0:
                        if total[labels[y, x]] == 0:
                            found[t, touched] = labels[y, x]
                            touched += 1
                        total[labels[y, x]] += share
            names = np.sort(found[t, :touched])
            for j in range(touched):
                found[t, j] = names[j]
                values[t, j] = total[names[j]]
                total[names[j]] = 0
            counts[t + 1] = touched
    starts = np.cumsum(counts)
    final_columns = np.empty(starts[-1], np.int32)
    final_values = np.empty(starts[-1], np.float64)
    for t in range(rows):
        for j in range(counts[t + 1]):
            final_columns[starts[t] + j] = found[t, j]
            final_values[starts[t] + j] = values[t, j]
    return starts, final_columns, final_values


@compiled(parallel=True)
@no_type_check
def corner_weights(
    row_base, row_fraction, column_base, column_fraction, offsets, token_columns, mask, token_labels, masked,
    zero_isolated, first_token, bases, weights,
):  # fmt: skip
    """Write `Interpolation.base` and `.weights` of one view's pixels; return how many are isolated.

    The weights are those of `upsampling.interpolation_weights`, by the same operations.
    """
    height, width = row_base.size, column_base.size
    isolated = np.zeros(height, np.int64)
    one = row_fraction.dtype.type(1)
    for y in numba.prange(height):
        low, high = one - row_fraction[y], row_fraction[y]
        for x in range(width):
            pixel = y * width + x
            base = row_base[y] * token_columns + column_base[x]
            left, right = one - column_fraction[x], column_fraction[x]
            a, b, c, d = low * left, low * right, high * left, high * right
            bases[pixel] = first_token + base
            if masked:
                label = mask[y, x]
                zero = one - one
                ma = a if token_labels[base] == label else zero
                mb = b if token_labels[base + offsets[1]] == label else zero
                mc = c if token_labels[base + offsets[2]] == label else zero
                md = d if token_labels[base + offsets[3]] == label else zero
                total = ma + mb + mc + md
                if total > zero:
                    a, b, c, d = ma / total, mb / total, mc / total, md / total
                else:
                    isolated[y] += 1
                    if zero_isolated:
                        a, b, c, d = zero, zero, zero, zero
            weights[pixel, 0], weights[pixel, 1], weights[pixel, 2], weights[pixel, 3] = a, b, c, d
    return isolated.sum()


@compiled(parallel=True)
@no_type_check
def majority_labels(mask, count, h, w):
    """`upsampling.token_labels` by majority, for ids from 0 to below `count`; at least one pixel per token."""
    height, width = mask.shape
    labels = np.empty(h * w, mask.dtype)
    # The pixels whose centre lies in token row i, as in the twin: floor((y + 0.5) h / H).
    row_of, column_of = np.empty(height, np.int64), np.empty(width, np.int64)
    for y in range(height):
        row_of[y] = min(np.int64((np.float32(y) + np.float32(0.5)) * np.float32(h) / np.float32(height)), h - 1)
    for x in range(width):
        column_of[x] = min(np.int64((np.float32(x) + np.float32(0.5)) * np.float32(w) / np.float32(width)), w - 1)
    row_starts = np.searchsorted(row_of, np.arange(h + 1))
    for i in numba.prange(h):
        counts = np.zeros((w, count), np.int32)
        for y in range(row_starts[i], row_starts[i + 1]):
            for x in range(width):
                counts[column_of[x], mask[y, x]] += 1
        for j in range(w):
            labels[i * w + j] = np.argmax(counts[j])  # the first, hence the smallest, of equally common ones
    return labels
