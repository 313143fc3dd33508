"""The parameters of `cifar10_ddpmpp_deep_continuous`, written out from the published layout, not from the code."""


def _res(i, cin, cout, *, resample=False):
    yield f"all_modules.{i}.GroupNorm_0.weight", (cin,)
    yield f"all_modules.{i}.GroupNorm_0.bias", (cin,)
    yield f"all_modules.{i}.Conv_0.weight", (cout, cin, 3, 3)
    yield f"all_modules.{i}.Conv_0.bias", (cout,)
    yield f"all_modules.{i}.Dense_0.weight", (cout, 512)
    yield f"all_modules.{i}.Dense_0.bias", (cout,)
    yield f"all_modules.{i}.GroupNorm_1.weight", (cout,)
    yield f"all_modules.{i}.GroupNorm_1.bias", (cout,)
    yield f"all_modules.{i}.Conv_1.weight", (cout, cout, 3, 3)
    yield f"all_modules.{i}.Conv_1.bias", (cout,)
    if resample or cin != cout:
        yield f"all_modules.{i}.Conv_2.weight", (cout, cin, 1, 1)
        yield f"all_modules.{i}.Conv_2.bias", (cout,)


def _attention(i, c):
    yield f"all_modules.{i}.GroupNorm_0.weight", (c,)
    yield f"all_modules.{i}.GroupNorm_0.bias", (c,)
    for n in range(4):
        yield f"all_modules.{i}.NIN_{n}.W", (c, c)
        yield f"all_modules.{i}.NIN_{n}.b", (c,)


def _plain(i, *shape):
    yield f"all_modules.{i}.weight", shape
    yield f"all_modules.{i}.bias", shape[:1]


def deep_parameters():
    """(name, shape) of all 956 tensors, in registration order."""
    rows = [*_plain(0, 512, 128), *_plain(1, 512, 512), *_plain(2, 128, 3, 3, 3)]
    for i in range(3, 11):
        rows += _res(i, 128, 128)
    rows += _res(11, 128, 128, resample=True)
    for i in range(12, 28, 2):
        rows += _res(i, 128 if i == 12 else 256, 256)
        rows += _attention(i + 1, 256)
    rows += _res(28, 256, 256, resample=True)
    for i in range(29, 37):
        rows += _res(i, 256, 256)
    rows += _res(37, 256, 256, resample=True)
    for i in range(38, 46):
        rows += _res(i, 256, 256)
    rows += [*_res(46, 256, 256), *_attention(47, 256), *_res(48, 256, 256)]
    for i in range(49, 58):
        rows += _res(i, 512, 256)
    rows += _res(58, 256, 256, resample=True)
    for i in range(59, 68):
        rows += _res(i, 512, 256)
    rows += _res(68, 256, 256, resample=True)
    for i in range(69, 77):
        rows += _res(i, 512, 256)
    rows += [*_res(77, 384, 256), *_attention(78, 256), *_res(79, 256, 256, resample=True)]
    rows += _res(80, 384, 128)
    for i in range(81, 89):
        rows += _res(i, 256, 128)
    rows += [*_plain(89, 128), *_plain(90, 3, 128, 3, 3)]
    return rows
