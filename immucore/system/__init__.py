"""What the booted system does with its images: install, upgrade, boot counting, reboots. In no initramfs."""
