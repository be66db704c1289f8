"""What the tests share: a real cloud, a storage node, broken services, disks."""
