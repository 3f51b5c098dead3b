"""What a plan says of the memory where a long example is made to fit: in pieces, then with inputs elsewhere."""

from tasks.planning.peaks import Peak, fit_long, predict_peak

# 40 layers of 4,096 and 12,288 values, an example of 131,072 tokens in 16 bits: an input is 1 GiB, all of them 40.
_WORK = {
    "largest_pass": 131_072.0, "layers": 40.0, "hidden": 4096.0, "width": 12_288.0, "vocabulary": 32_000.0,
    "recomputed": 1.0, "resident": 0.0,
}  # fmt: skip
_ASKED = Peak(fixed_bytes=16 << 30, itemsize=2, rank=16, work=_WORK)
_PLENTY = 1e15


def fit(room_gib: float, host_bytes: float = _PLENTY, asked: Peak = _ASKED) -> dict[str, float]:
    found = fit_long([], asked, room_bytes=room_gib * 2**30, host_bytes=host_bytes).work
    return {name: found[name] for name in ("piece", "in_host") if name in found}


def predict(**work: float) -> float:
    return predict_peak([], Peak(_ASKED.fixed_bytes, 2, 16, {**_WORK, **work}), device="cuda").value


def test_a_piece_and_inputs_elsewhere_take_what_they_spare() -> None:
    whole = predict()
    # Of a layer's width, two values a token: 131,072 of them against 8,192.
    assert whole - predict(piece=8192.0) == 2 * 12_288 * 2 * (131_072 - 8192)
    # Two of the inputs that lie elsewhere are on their way.
    assert whole - predict(in_host=12.0) == 10 * (1 << 30)
    assert predict(in_host=2.0) == whole


def test_no_more_is_done_than_it_takes() -> None:
    whole, in_pieces = predict() / 2**30, predict(piece=8192.0) / 2**30
    assert fit(whole) == {}
    assert fit(whole - 1) == {"piece": 8192.0}
    assert fit(in_pieces - 0.5) == {"piece": 8192.0, "in_host": 3.0}
    assert fit(in_pieces - 9.5) == {"piece": 8192.0, "in_host": 12.0}
    assert fit(1) == {"piece": 8192.0, "in_host": 39.0}  # it does not fit; the plan says so elsewhere
    assert fit(1, host_bytes=20.5 * 2**30) == {"piece": 8192.0, "in_host": 20.0}
    assert fit(1, host_bytes=0.0) == {"piece": 8192.0}


def test_layers_that_keep_their_work_are_left_as_they_are() -> None:
    assert fit(1, asked=Peak(16 << 30, 2, 16, {**_WORK, "recomputed": 0.5})) == {}


def test_it_is_what_was_measured_of_the_8b_shape_on_a_gpu() -> None:
    """docs/scale.md has the figures: MiB a token of 32 layers, all recomputed, one example of 131,072 tokens."""
    llama = {**_WORK, "layers": 32.0, "width": 14_336.0, "vocabulary": 0.0}

    def count(**ways: float) -> float:
        asked = Peak(0, 2, 0, {**llama, **ways})
        nothing = Peak(0, 2, 0, {**llama, "largest_pass": 0.0})
        spare = [predict_peak([], each, device="cuda").value for each in (asked, nothing)]
        return (spare[0] - spare[1]) / 131_072 / 2**20

    assert abs(count(piece=8192.0) / 0.337 - 1) < 0.05
    assert abs((count() - count(in_host=31.0)) / (0.438 - 0.212) - 1) < 0.01
