import torch

from lit_gen.callbacks.samples import GAP, contact_sheet


def test_cells_of_a_sheet_keep_their_shape():
    wide, square = torch.zeros(2, 3, 20, 32), torch.zeros(3, 20, 20)
    sheet = contact_sheet([[wide, wide[0]]], rows=[square], size=40)
    assert sheet.shape == (2, 3, 40 + GAP, 3 * (64 + GAP))
    head, *cells = (sheet[..., :40, i * (64 + GAP) :][..., :64] for i in range(3))
    assert all((cell == 0).all() for cell in cells)
    assert (head[..., 12:52] == 0).all() and (head[..., :12] == 1).all() and (head[..., 52:] == 1).all()


def test_shrunk_pictures_are_smoothed_and_enlarged_ones_are_not():
    board = (torch.arange(256).view(-1, 1) + torch.arange(256)).remainder(2).float().expand(3, -1, -1) * 2 - 1
    inner = contact_sheet([[board]], size=64)[:, 2:62, 2:62]
    assert inner.abs().max() < 0.05  # not the stripes or the plain colour that picking every fourth pixel shows
    pixels = torch.rand(3, 8, 8)
    assert torch.equal(contact_sheet([[pixels]], size=32)[:, :32:4, :32:4], pixels)
