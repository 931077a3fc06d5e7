"""The memory that Linux lets a container, or a job of a cluster, use: limits of its control groups."""

from pathlib import Path


def free_of_groups(mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the least number of bytes that a control group of this process may still use, or a huge number.

    Groups are nested, and each has a limit of its own. What the kernel can drop from a group's memory, files that it has
    read, counts as free. Version 2 has all groups below `mount`, version 1 those of the memory below `mount/memory`.
    Inside of a container the path of a group may be unknown; the group that is seen at the mount is then its own.
    """
    least = 1 << 62
    try:
        lines = own.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeError):
        return least
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, dropped = mount, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            dropped = "total_inactive_file"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                most, now = int((folder / limit).read_text()), int((folder / used).read_text())
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines() if line)
            except (OSError, ValueError):
                continue  # No limit ("max"), or a group that cannot be seen from here.
            least = min(least, max(0, most - now + int(counts.get(dropped, 0))))
    return least
