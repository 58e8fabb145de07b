import itertools

import pytest

from textbrewer.report.layout import axis, place_labels, unbeaten


def test_unbeaten_models():
    #        fast      slower, better   beaten by the first   twice the same
    values = [(-1, 80), (-5, 90), (-2, 79), (-3, 85), (-3, 85)]
    assert unbeaten(values) == [True, True, False, True, True]


@pytest.mark.parametrize("values", [[3.0, 4.0], [0.012, 0.018], [5.0], [0.0], [90.1, 90.4, 88.0], [1.0, 900.0]])
@pytest.mark.parametrize("from_zero", [True, False])
def test_axes_hold_their_values_and_some_ticks(values, from_zero):
    found = axis(values, from_zero)
    assert all(0 <= found.place(value) <= 1 for value in values)
    assert 2 <= len(found.ticks) <= 9
    assert all(-1e-9 <= found.place(tick) <= 1 + 1e-9 for tick in found.ticks)
    places = [found.place(tick) for tick in found.ticks]
    assert places == sorted(set(places))
    if from_zero and not found.log:
        assert found.start == 0
    assert found.log == (from_zero and max(values) > 20 * min(values) > 0)


def test_labels_do_not_cover_each_other_nor_leave_the_picture():
    points = [(100.0, 100.0), (104.0, 100.0), (100.0, 104.0), (290.0, 100.0), (5.0, 195.0)]
    widths, height, room = [60.0] * 5, 12.0, (300.0, 200.0)
    boxes = []
    for (x, y, anchor), width in zip(place_labels(points, widths, height, room), widths, strict=True):
        left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
        boxes.append((left, y - height / 2, left + width, y + height / 2))
    for left, top, right, bottom in boxes:
        assert left >= 0
        assert top >= 0
        assert right <= room[0]
        assert bottom <= room[1]
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
