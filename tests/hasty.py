"""How tests compile: most of their time would be compiling, so XLA and LLVM optimize little."""

OPTIONS = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)


def flags(devices: int) -> str:
    """XLA_FLAGS for so many devices made of this machine's CPU."""
    return f"--xla_force_host_platform_device_count={devices} {OPTIONS}"
