//! The 32-bit Mersenne Twister, for orders that must equal those of torch.
//!
//! Matsumoto and Nishimura, "Mersenne Twister: a 623-dimensionally equidistributed uniform pseudo-random number
//! generator", 1998, with the initialisation of the authors' 2002 version.

const WORDS: usize = 624;
const MIDDLE: usize = 397;

/// The generator's state: 624 words, of which `next` is the first that was not yet handed out.
pub(crate) struct Mt19937 {
    words: [u32; WORDS],
    next: usize,
}

impl Mt19937 {
    /// Seeds the generator. Only 32 bits of a seed matter, as in torch: the caller truncates.
    pub(crate) fn new(seed: u32) -> Self {
        let mut words = [0; WORDS];
        let mut last = seed;
        for (j, word) in (0u32..).zip(words.iter_mut()) {
            if j > 0 {
                last = 1_812_433_253u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(j);
            }
            *word = last;
        }
        Self { words, next: WORDS }
    }

    /// Makes the next 624 words out of the present ones.
    fn refill(&mut self) {
        let twist = |high: u32, low: u32, far: u32| {
            let joined = (high & 0x8000_0000) | (low & 0x7fff_ffff);
            far ^ (joined >> 1) ^ if low & 1 == 1 { 0x9908_b0df } else { 0 }
        };
        let words = &mut self.words;
        // Three stretches instead of one with `% WORDS`: the remainder would cost more than the twist itself.
        for i in 0..WORDS - MIDDLE {
            words[i] = twist(words[i], words[i + 1], words[i + MIDDLE]);
        }
        for i in WORDS - MIDDLE..WORDS - 1 {
            words[i] = twist(words[i], words[i + 1], words[i + MIDDLE - WORDS]);
        }
        words[WORDS - 1] = twist(words[WORDS - 1], words[0], words[MIDDLE - 1]);
        self.next = 0;
    }

    /// The next tempered word.
    pub(crate) fn next_u32(&mut self) -> u32 {
        if self.next == WORDS {
            self.refill();
        }
        let mut y = self.words[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Two words, the first of them in the high half.
    pub(crate) fn next_u64(&mut self) -> u64 {
        let high = u64::from(self.next_u32());
        (high << 32) | u64::from(self.next_u32())
    }
}

#[cfg(test)]
mod tests {
    use super::Mt19937;

    #[test]
    fn the_ten_thousandth_word_of_seed_5489_is_the_published_one() {
        let mut generator = Mt19937::new(5489);
        let last = (0..10_000).map(|_| generator.next_u32()).last();
        assert_eq!(last, Some(4_123_659_995));
    }
}
