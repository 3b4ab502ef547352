"""A stand-in for Rockchip's RKLLM-Toolkit, after npu-contracts.md (D2): it checks what it is given and writes a file that is no model."""
