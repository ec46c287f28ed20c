"""The rule repositories that Bazel 2.1 loads by name, as thin wrappers of its own built-in rules, to run it offline."""

import pathlib

# repository -> .bzl file -> rules that are passed on to the built-in ones
RULES = {
    "rules_cc": {
        "cc/defs.bzl": [
            "cc_binary",
            "cc_import",
            "cc_library",
            "cc_proto_library",
            "cc_test",
            "cc_toolchain",
            "cc_toolchain_suite",
            "fdo_prefetch_hints",
        ]
    },
    "rules_java": {
        "java/defs.bzl": [
            "java_binary",
            "java_import",
            "java_library",
            "java_lite_proto_library",
            "java_package_configuration",
            "java_plugin",
            "java_proto_library",
            "java_runtime",
            "java_test",
            "java_toolchain",
        ]
    },
    "rules_proto": {"proto/defs.bzl": ["proto_lang_toolchain", "proto_library"]},
    "rules_python": {"python/defs.bzl": ["py_binary", "py_library", "py_test"]},
    "remote_coverage_tools": {},
}


def write_stubs(directory: pathlib.Path) -> list[str]:
    """Writes the stub repositories under `directory`; returns the Bazel flags that put them in force."""
    flags = []
    for repository, files in RULES.items():
        root = directory / repository
        root.mkdir(parents=True)
        (root / "WORKSPACE").write_text(f'workspace(name = "{repository}")\n')
        (root / "BUILD").write_text("")
        for file, rules in files.items():
            (root / file).parent.mkdir()
            (root / file).parent.joinpath("BUILD").write_text("")
            (root / file).write_text("".join(f"def {r}(**kwargs):\n    native.{r}(**kwargs)\n\n" for r in rules))
        flags.append(f"--override_repository={repository}={root}")
    _write_coverage(directory / "remote_coverage_tools")
    return flags


def _write_coverage(root: pathlib.Path) -> None:
    """Test rules name these tools even when no coverage is collected; they are never run."""
    names = ("coverage_report_generator", "lcov_merger", "Main")
    targets = "".join(f'sh_binary(name = "{name}", srcs = ["noop.sh"])\n' for name in names)
    targets += 'filegroup(name = "coverage_output_generator", srcs = ["noop.sh"])\n'
    (root / "BUILD").write_text('package(default_visibility = ["//visibility:public"])\n' + targets)
    (root / "noop.sh").write_text("#!/bin/sh\nexit 0\n")
    (root / "noop.sh").chmod(0o755)
