//! What drivers say of a compiled kernel, in the same units for all cards.

use std::collections::BTreeMap;

/// Figures of a kernel on a card.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    /// Registers of 32 bits per invocation.
    pub registers: u64,
    /// What did not fit and went to memory, as the driver counts: registers, or stores of registers.
    pub spills: u64,
    /// Bytes of private memory per invocation: spills, and arrays that are not in registers.
    pub scratch: u64,
    /// Share of the invocations that the card can hold at a time, in percent.
    pub occupancy: u64,
    /// Instructions of the whole kernel.
    pub instructions: u64,
}

impl Figures {
    /// Reads a driver's statistics. `subgroup` is the size of one. An error names the statistics, where they are of no
    /// known driver.
    pub fn new(card: &str, subgroup: u32, statistics: &BTreeMap<String, u64>) -> Result<Figures, String> {
        let get = |name: &str| statistics.get(name).copied().unwrap_or(0);
        let of = |part: u64, whole: u64| 100 * part.min(whole) / whole;
        let has = |name: &str| statistics.contains_key(name);
        Ok(if has("VGPRs") {
            // RADV counts waves of 32, whatever the size of the kernel's.
            let waves = get("Subgroups per SIMD") * 32 / u64::from(subgroup.max(32));
            Figures {
                registers: get("VGPRs"),
                spills: get("Spilled VGPRs") + get("Spilled SGPRs"),
                scratch: get("Scratch size"),
                occupancy: of(waves, 16),
                instructions: get("Instructions"),
            }
        } else if has("Number of GPRs") {
            Figures {
                registers: get("Number of GPRs"),
                spills: get("Spills to memory"),
                scratch: get("SLM size"),
                occupancy: of(get("Max warps/SM"), if card == "turing" { 32 } else { 48 }),
                instructions: get("Instruction count"),
            }
        } else if has("GPRs") {
            Figures {
                // Halves of registers.
                registers: get("GPRs").div_ceil(2),
                spills: get("Spills"),
                scratch: get("Scratch"),
                occupancy: of(get("Threads"), 1024),
                instructions: get("Instructions"),
            }
        } else if has("Registers used") {
            Figures {
                // Quads of registers, and quads of halves, which share the same memory.
                registers: 4 * get("Registers used").max(get("Half-registers used").div_ceil(2)),
                // Stores to private memory. The driver does not say how large it is.
                spills: get("STP Count"),
                scratch: 0,
                occupancy: of(get("Max Waves Per Core"), 16),
                instructions: get("Instruction Count"),
            }
        } else {
            let names: Vec<&str> = statistics.keys().map(String::as_str).collect();
            return Err(format!("expected statistics of RADV, NVK, Honeykrisp or Turnip; got {}", names.join(", ")));
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Statistics as `name: value` lines.
    fn figures(card: &str, subgroup: u32, recorded: &str) -> Figures {
        let statistic = |line: &str| {
            let (name, value) = line.split_once(": ").unwrap();
            (name.to_string(), value.parse().unwrap())
        };
        Figures::new(card, subgroup, &recorded.lines().map(statistic).collect()).unwrap()
    }

    #[test]
    fn every_driver_has_its_own_names_and_units() {
        let radv = figures("rdna3", 64, include_str!("../tests/data/statistics/radv.txt"));
        let expected = Figures { registers: 132, spills: 0, scratch: 0, occupancy: 31, instructions: 3670 };
        assert_eq!(radv, expected);
        let nvk = figures("ampere", 32, include_str!("../tests/data/statistics/nvk.txt"));
        let expected = Figures { registers: 120, spills: 0, scratch: 0, occupancy: 33, instructions: 4434 };
        assert_eq!(nvk, expected);
        let honeykrisp = figures("m1", 32, include_str!("../tests/data/statistics/honeykrisp.txt"));
        let expected = Figures { registers: 128, spills: 33, scratch: 48, occupancy: 37, instructions: 5593 };
        assert_eq!(honeykrisp, expected);
        let turnip = figures("adreno", 64, include_str!("../tests/data/statistics/turnip.txt"));
        let expected = Figures { registers: 192, spills: 0, scratch: 0, occupancy: 25, instructions: 3548 };
        assert_eq!(turnip, expected);
    }

    #[test]
    fn occupancy_is_of_what_the_card_holds() {
        let recorded = "Number of GPRs: 64\nMax warps/SM: 32";
        assert_eq!(figures("turing", 32, recorded).occupancy, 100);
        assert_eq!(figures("ada", 32, recorded).occupancy, 66);
    }

    #[test]
    fn statistics_of_another_driver_are_an_error() {
        let message = Figures::new("xe", 16, &[("SEND count".into(), 1)].into()).unwrap_err();
        assert!(message.contains("SEND count"), "{message}");
    }
}
