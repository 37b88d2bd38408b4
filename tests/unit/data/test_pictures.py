"""Contact sheets hold every frame where a reader expects it."""

import numpy as np

from megavideo.data.pictures import GAP, contact_sheet


def test_frames_stand_side_by_side_enlarged_without_blur() -> None:
    red, green = np.zeros((2, 4, 4, 3), np.uint8)
    red[..., 0], green[..., 1] = 255, 255
    sheet = np.asarray(contact_sheet([[red, green]], [""], scale=3))
    assert sheet.shape == (12 + 2 * GAP, 3 * GAP + 24, 3)
    assert (sheet[GAP : GAP + 12, GAP : GAP + 12] == (255, 0, 0)).all()
    assert (sheet[GAP : GAP + 12, 2 * GAP + 12 : 2 * GAP + 24] == (0, 255, 0)).all()


def test_a_label_stands_above_its_row_and_long_ones_are_wrapped() -> None:
    frames = [np.zeros((16, 16, 3), np.uint8)] * 4
    short, long = contact_sheet([frames], ["hi"]), contact_sheet([frames], ["many words " * 9])
    assert short.width == long.width and long.height > short.height
    label = np.asarray(short)[: -16 - GAP]
    assert label.min() < 128 and label.max() == 255
