//! the heart: lifecycle machine, one task per sandbox, records, recovery, guest client
