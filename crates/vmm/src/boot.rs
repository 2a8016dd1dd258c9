//! Loading a Linux kernel and describing the machine to it: loader, e820, ACPI, CPU tables.
