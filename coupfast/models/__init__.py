"""Score networks and classifiers, their weight files, and the names they are loaded by.

`load_score` and `load_classifier` are in `zoo`. One file registers each family of networks: `ddpmpp`, `diffusers_unet`,
`wide_resnet`, `dm_wide_resnet`, `resnet18_at`; `tiny` the pair that ships with the package, `robustbench` RobustBench's names.
`registry` says how one is added, here or from outside.
"""
