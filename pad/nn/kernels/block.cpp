// Instance normalisation, ReLU and 2 x 2 average pooling in one: value, derivative along a direction, gradients of both.
//
// Tensors are channels-last, [images, height, width, channels]. The unit of work is an image's next LANES channels, one
// vector a pixel: it is read from memory once and worked on in the nearest cache. With mean and variance over the
// n = height * width pixels of each channel,
//     z = (x - mean) r,  r = 1 / sqrt(variance + eps),  u = weight z + bias,  out = pool(max(u, 0)).
// Along (x', weight', bias'), with m = mean(z x'):
//     z' = r (x' - mean(x') - m z),  u' = weight z' + weight' z + bias',  out' = pool([u > 0] u').
// As the first block it takes the images themselves and convolves them too: 3 x 3 kernels over few channels are computed
// faster than their result is written and read. A bias of the convolution is a constant of the plane, which normalisation
// takes away. The images' own gradient is left to a matrix product with what first_dual_backward writes, and to fold.
//
// What an odd last row or column holds takes part in the statistics and is not pooled.
//
// The prefetches matter because a unit's pixels lie `channels` numbers apart, which hardware does not see coming.

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

namespace {

struct Shape {
    int64_t images, channels, height, width;
};

template <typename T, int LANES>
struct Block {
    typedef T V __attribute__((vector_size(LANES * sizeof(T))));                                     // aligned
    typedef T U __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), __may_alias__));  // anywhere

    static V load(const T* from) { return *reinterpret_cast<const U*>(from); }
    static void store(T* to, const V& value) { *reinterpret_cast<U*>(to) = value; }

    template <int K>
    struct Sums {
        V of[K];

        V& operator[](int k) { return of[k]; }
        const V& operator[](int k) const { return of[k]; }
    };

    // One unit of work: an image's LANES channels.
    struct Unit {
        const Shape& s;
        int64_t image, channel, n;
        V *x, *dx;  // copies, pixel after pixel; normalise moves x nearer to zero
        V mean, r;  // the mean of x as it then is

        int64_t at(int64_t pixel) const { return (image * n + pixel) * s.channels + channel; }
        int64_t row() const { return image * s.channels + channel; }
        V z(int64_t pixel) const { return (x[pixel] - mean) * r; }

        void read(const T* from, V* to) const {
            for (int64_t i = 0; i < n; ++i) {
                __builtin_prefetch(from + at(i + 16));
                to[i] = load(from + at(i));
            }
        }

        void expect_writes(const T* to) const {
            for (int64_t i = 0; i < n; ++i) __builtin_prefetch(to + at(i), 1);
        }

        // Convolution of padded images [images, height + 2, width + 2, CIN] with weights [3, 3, CIN, channels]
        template <int CIN>
        void convolve(const T* images, const T* weight, V* to) const {
            constexpr int ROW = 3 * CIN;
            const int64_t stride = (s.width + 2) * CIN;
            V w[3 * ROW];
            for (int t = 0; t < 3 * ROW; ++t) w[t] = load(weight + t * s.channels + channel);
            const auto pixels = [&](auto count, int64_t i, int64_t j) {
                V sums[count()] = {};
                for (int k = 0; k < 3; ++k) {
                    const T* row = images + (image * (s.height + 2) + i + k) * stride + j * CIN;
                    for (int t = 0; t < ROW; ++t)
                        for (int q = 0; q < count(); ++q) sums[q] += w[k * ROW + t] * row[q * CIN + t];
                }
                for (int q = 0; q < count(); ++q) to[i * s.width + j + q] = sums[q];
            };
            for (int64_t i = 0; i < s.height; ++i) {
                int64_t j = 0;
                for (; j + 8 <= s.width; j += 8) pixels(std::integral_constant<int, 8>(), i, j);
                for (; j < s.width; ++j) pixels(std::integral_constant<int, 1>(), i, j);
            }
        }

        // The gradient in those weights of <grad, convolution>, of one image: [3, 3, CIN, channels]
        template <int CIN>
        void weight_gradient(const T* images, const V* grad, T* grad_weight) const {
            constexpr int ROW = 3 * CIN;
            const int64_t stride = (s.width + 2) * CIN;
            for (int k = 0; k < 3; ++k) {
                V sums[ROW] = {};
                for (int64_t i = 0; i < s.height; ++i) {
                    const T* row = images + (image * (s.height + 2) + i + k) * stride;
                    for (int64_t j = 0; j < s.width; ++j, row += CIN) {
                        const V g = grad[i * s.width + j];
                        for (int t = 0; t < ROW; ++t) sums[t] += g * row[t];
                    }
                }
                for (int t = 0; t < ROW; ++t)
                    store(grad_weight + ((image * 3 + k) * ROW + t) * s.channels + channel, sums[t]);
            }
        }

        // x becomes its distance from near the mean, so that the squares of what is left cancel nothing: from the mean
        // of every eighth pixel. In any plane that is within sqrt(7) standard deviations: of a share p of all it is
        // within sqrt(1 / p - 1), by Cauchy and Schwarz. What all pixels have in common is taken off before adding up.
        void normalise(T eps) {
            V near{};
            for (int64_t i = 0; i < n; i += 8) near += x[i] - x[0];
            near = x[0] + near / T((n + 7) / 8);
            const auto totals = plane_sums<2>([&](int64_t pixel, auto& sums) {
                const V d = x[pixel] -= near;
                sums[0] += d;
                sums[1] += d * d;
            });
            mean = totals[0] / T(n);
            const V variance = totals[1] / T(n) - mean * mean;
            for (int l = 0; l < LANES; ++l) r[l] = 1 / std::sqrt(variance[l] + eps);
        }

        // The sums of dx, and of dx times z.
        Sums<2> along() const {
            return plane_sums<2>([&](int64_t pixel, auto& sums) {
                sums[0] += dx[pixel];
                sums[1] += dx[pixel] * z(pixel);
            });
        }

        // K sums over windows: add(first pixel, where its pooled value lies, part) adds up one. Windows have a part
        // each, as additions that wait for one another would take most of the time. So have rows of windows, since
        // rounding errors grow with the length of a chain of additions.
        template <int K, typename F>
        Sums<K> window_sums(F add) const {
            Sums<K> total{}, row{};
            windows(
                [&](int64_t first, int64_t to) {
                    Sums<K> window{};
                    add(first, to, window);
                    for (int k = 0; k < K; ++k) row[k] += window[k];
                },
                [&] {
                    for (int k = 0; k < K; ++k) total[k] += row[k];
                    row = {};
                });
            return total;
        }

        // K sums over all pixels, by add(pixel, sums)
        template <int K, typename F>
        Sums<K> plane_sums(F add) const {
            auto total = window_sums<K>([&](int64_t first, int64_t, auto& sums) {
                for (int64_t pixel : four(first)) add(pixel, sums);
            });
            rest([&](int64_t pixel) { add(pixel, total); });
            return total;
        }

        std::array<int64_t, 4> four(int64_t first) const { return {first, first + 1, first + s.width, first + s.width + 1}; }

        // f(first pixel of a window of 2 x 2, where its pooled value lies); end_row() after each row of windows
        template <typename F, typename G>
        void windows(F f, G end_row) const {
            for (int64_t i = 0; i < s.height / 2; ++i) {
                for (int64_t j = 0; j < s.width / 2; ++j)
                    f(2 * (i * s.width + j),
                      ((image * (s.height / 2) + i) * (s.width / 2) + j) * s.channels + channel);
                end_row();
            }
        }

        template <typename F>
        void windows(F f) const {
            windows(f, [] {});
        }

        // f(pixel) for those in no window
        template <typename F>
        void rest(F f) const {
            if (s.width % 2)
                for (int64_t i = 0; i < s.height / 2 * 2; ++i) f(i * s.width + s.width - 1);
            if (s.height % 2)
                for (int64_t j = 0; j < s.width; ++j) f((s.height - 1) * s.width + j);
        }

        // f(pixel, where its window's pooled value lies)
        template <typename F>
        void pooled(F f) const {
            windows([&](int64_t first, int64_t to) {
                for (int64_t pixel : four(first)) f(pixel, to);
            });
        }
    };

    // f(unit) for all units, filled by fill(unit)
    template <typename Fill, typename F>
    static void each(const Shape& s, T eps, Fill fill, F f) {
        const int64_t n = s.height * s.width, blocks = s.channels / LANES;
#pragma omp parallel
        {
            V* memory = static_cast<V*>(std::aligned_alloc(alignof(V), 2 * n * sizeof(V)));
            if (!memory) std::abort();
#pragma omp for schedule(static)
            for (int64_t k = 0; k < s.images * blocks; ++k) {
                Unit unit{s, k / blocks, k % blocks * LANES, n, memory, memory + n, V{}, V{}};
                fill(unit);
                unit.normalise(eps);
                f(unit);
            }
            std::free(memory);
        }
    }

    // What fills a unit: its x, and in the derivatives along a direction its dx
    static auto reader(const T* x) {
        return [=](const Unit& unit) { unit.read(x, unit.x); };
    }

    static auto reader(const T* x, const T* dx) {
        return [=](const Unit& unit) {
            unit.read(x, unit.x);
            unit.read(dx, unit.dx);
        };
    }

    template <int CIN>
    static auto convolver(const T* images, const T* kernel) {
        return [=](const Unit& unit) { unit.template convolve<CIN>(images, kernel, unit.x); };
    }

    template <int CIN>
    static auto convolver(const T* images, const T* kernel, const T* dkernel) {
        return [=](const Unit& unit) {
            unit.template convolve<CIN>(images, kernel, unit.x);
            unit.template convolve<CIN>(images, dkernel, unit.dx);
        };
    }

    template <typename Fill>
    static void forward(Shape s, T eps, Fill fill, const T* weight, const T* bias, T* out) {
        each(s, eps, fill, [=](const Unit& unit) {
            const V w = load(weight + unit.channel), b = load(bias + unit.channel);
            unit.windows([&](int64_t first, int64_t to) {
                V total{};
                for (int64_t pixel : unit.four(first)) {
                    const V u = w * unit.z(pixel) + b;
                    total += u <= 0 ? V{} : u;  // not a number stays so
                }
                store(out + to, total * T(0.25));
            });
        });
    }

    // Gradients of <grad, out>; those in weight and bias for every image, [images, channels]. v is the gradient in u, and
    // put(unit, pixel, g) takes that in the block's input.
    template <typename Fill, typename Put, typename Done>
    static void backward(Shape s, T eps, const T* grad, Fill fill, const T* weight, const T* bias, T* grad_weight,
                         T* grad_bias, Put put, Done done) {
        each(s, eps, fill, [=](const Unit& unit) {
            const V w = load(weight + unit.channel), b = load(bias + unit.channel);
            const auto sums = unit.template window_sums<2>([&](int64_t first, int64_t to, auto& part) {
                const V g = load(grad + to);
                for (int64_t pixel : unit.four(first)) {
                    const V z = unit.z(pixel), v = w * z + b > 0 ? g : V{};
                    part[0] += v;
                    part[1] += z * v;
                }
            });
            const V sum_v = sums[0] * T(0.25), sum_zv = sums[1] * T(0.25);
            store(grad_weight + unit.row(), sum_zv);
            store(grad_bias + unit.row(), sum_v);
            const V scale = w * unit.r, quarter = scale * T(0.25), shift = scale * sum_v / T(unit.n),
                    slope = scale * sum_zv / T(unit.n);
            unit.pooled([&](int64_t pixel, int64_t to) {
                const V z = unit.z(pixel), v = w * z + b > 0 ? load(grad + to) : V{};
                put(unit, pixel, quarter * v - shift - slope * z);
            });
            unit.rest([&](int64_t pixel) { put(unit, pixel, -shift - slope * unit.z(pixel)); });
            done(unit);
        });
    }

    static void backward(Shape s, T eps, const T* grad, const T* x, const T* weight, const T* bias, T* grad_x,
                         T* grad_weight, T* grad_bias) {
        const auto read = [=](const Unit& unit) {
            unit.expect_writes(grad_x);
            unit.read(x, unit.x);
        };
        backward(
            s, eps, grad, read, weight, bias, grad_weight, grad_bias,
            [=](const Unit& unit, int64_t pixel, const V& g) { store(grad_x + unit.at(pixel), g); }, [](const Unit&) {});
    }

    template <int CIN>
    static void first_backward(Shape s, T eps, const T* grad, const T* images, const T* kernel, const T* weight,
                               const T* bias, T* grad_kernel, T* grad_weight, T* grad_bias) {
        backward(
            s, eps, grad, convolver<CIN>(images, kernel), weight, bias, grad_weight, grad_bias,
            [](const Unit& unit, int64_t pixel, const V& g) { unit.dx[pixel] = g; },
            [=](const Unit& unit) { unit.template weight_gradient<CIN>(images, unit.dx, grad_kernel); });
    }

    template <typename Fill>
    static void dual_forward(Shape s, T eps, Fill fill, const T* weight, const T* dweight, const T* bias, const T* dbias,
                             T* out, T* dout) {
        each(s, eps, fill, [=](const Unit& unit) {
            const int64_t c = unit.channel;
            const V w = load(weight + c), b = load(bias + c), dw = load(dweight + c), db = load(dbias + c);
            const auto along = unit.along();
            const V mean = along[0] / T(unit.n), m = along[1] / T(unit.n), scale = w * unit.r;
            const V of_z = dw - scale * m, shift = db - scale * mean;
            unit.windows([&](int64_t first, int64_t to) {
                V value{}, dvalue{};
                for (int64_t pixel : unit.four(first)) {
                    const V z = unit.z(pixel), u = w * z + b;
                    value += u <= 0 ? V{} : u;  // not a number stays so
                    dvalue += u > 0 ? scale * unit.dx[pixel] + of_z * z + shift : V{};
                }
                store(out + to, value * T(0.25));
                store(dout + to, dvalue * T(0.25));
            });
        });
    }

    // Gradients of <grad, out> + <dgrad, out'> in x, x', weight and bias. With v and dv the gradients in u and u', and
    // a = weight dv, the gradient in z' is a, and in z
    //     k = weight v + weight' dv - r (m a + x' mean(z a)).
    // y -> r (y - mean(y) - z mean(z y)) takes x' to z', is its own transpose, and is the derivative of x -> z; hence
    //     grad_x' = r (a - mean(a) - z mean(z a)),  grad_x = r (k - mean(k) - z mean(z k)) - r z mean(a z'),
    // the last term because z' also grows with r.
    // put(unit, pixel, gradient in x, gradient in x')
    template <typename Fill, typename Put, typename Done>
    static void dual_backward(Shape s, T eps, const T* grad, const T* dgrad, Fill fill, const T* weight,
                              const T* dweight, const T* bias, T* grad_weight, T* grad_bias, Put put, Done done) {
        each(s, eps, fill, [=](const Unit& unit) {
            const int64_t c = unit.channel;
            const T n = unit.n;
            const V w = load(weight + c), b = load(bias + c), dw = load(dweight + c), r = unit.r;
            const auto along = unit.along();
            auto sums = unit.template window_sums<5>([&](int64_t first, int64_t to, auto& part) {
                const V g = load(grad + to), dg = load(dgrad + to);
                for (int64_t pixel : unit.four(first)) {
                    const V z = unit.z(pixel), u = w * z + b, v = u > 0 ? g : V{}, dv = u > 0 ? dg : V{};
                    part[0] += v;
                    part[1] += z * v;
                    part[2] += dv;
                    part[3] += z * dv;
                    part[4] += unit.dx[pixel] * dv;
                }
            });
            for (V& sum : sums.of) sum *= T(0.25);
            const V sum_x = along[0], sum_zx = along[1];
            const V sum_v = sums[0], sum_zv = sums[1], sum_d = sums[2], sum_zd = sums[3], sum_xd = sums[4];
            const V mean_x = sum_x / n, m = sum_zx / n, mean_a = w * sum_d / n, mean_za = w * sum_zd / n;
            const V with_dz = r * (sum_xd - mean_x * sum_d - m * sum_zd);  // <dv, z'>
            store(grad_weight + unit.row(), sum_zv + with_dz);
            store(grad_bias + unit.row(), sum_v);
            // k = w v + of_dv dv + of_x x', whose sums are those of its parts
            const V of_dv = dw - r * m * w, of_x = -r * mean_za;
            const V mean_k = (w * sum_v + of_dv * sum_d + of_x * sum_x) / n;
            const V slope = (w * sum_zv + of_dv * sum_zd + of_x * sum_zx + w * with_dz) / n;
            const auto write = [&](int64_t pixel, const V& v, const V& dv) {
                const V z = unit.z(pixel), k = w * v + of_dv * dv + of_x * unit.dx[pixel];
                put(unit, pixel, r * (k - mean_k - slope * z), r * (w * dv - mean_a - mean_za * z));
            };
            unit.pooled([&](int64_t pixel, int64_t to) {
                const V u = w * unit.z(pixel) + b;
                write(pixel, u > 0 ? load(grad + to) * T(0.25) : V{}, u > 0 ? load(dgrad + to) * T(0.25) : V{});
            });
            unit.rest([&](int64_t pixel) { write(pixel, V{}, V{}); });
            done(unit);
        });
    }

    static void dual_backward(Shape s, T eps, const T* grad, const T* dgrad, const T* x, const T* dx, const T* weight,
                              const T* dweight, const T* bias, T* grad_x, T* grad_dx, T* grad_weight, T* grad_bias) {
        const auto read = [=](const Unit& unit) {
            unit.expect_writes(grad_x);
            unit.expect_writes(grad_dx);
            unit.read(x, unit.x);
            unit.read(dx, unit.dx);
        };
        const auto put = [=](const Unit& unit, int64_t pixel, const V& g, const V& dg) {
            store(grad_x + unit.at(pixel), g);
            store(grad_dx + unit.at(pixel), dg);
        };
        dual_backward(s, eps, grad, dgrad, read, weight, dweight, bias, grad_weight, grad_bias, put, [](const Unit&) {});
    }

    // grads: the gradients in both convolutions, side by side, [images, height, width, 2 channels]
    template <int CIN>
    static void first_dual_backward(Shape s, T eps, const T* grad, const T* dgrad, const T* images, const T* kernel,
                                    const T* dkernel, const T* weight, const T* dweight, const T* bias, T* grads,
                                    T* grad_kernel, T* grad_weight, T* grad_bias) {
        const auto put = [=](const Unit& unit, int64_t pixel, const V& g, const V& dg) {
            unit.x[pixel] = g;  // in the place of what is not needed any more
            T* to = grads + 2 * (unit.image * unit.n + pixel) * s.channels + unit.channel;
            store(to, g);
            store(to + s.channels, dg);
        };
        dual_backward(s, eps, grad, dgrad, convolver<CIN>(images, kernel, dkernel), weight, dweight, bias, grad_weight,
                      grad_bias, put,
                      [=](const Unit& unit) { unit.template weight_gradient<CIN>(images, unit.x, grad_kernel); });
    }
};

// Adds what each pixel gives to its 3 x 3 neighbours, [images, height, width, 3, 3, channels], to padded images, which
// begin as zeros: [images, height + 2, width + 2, channels].
template <typename T>
void fold(Shape s, const T* patches, T* images) {
    const int64_t stride = (s.width + 2) * s.channels, row = 3 * s.channels;
#pragma omp parallel for schedule(static)
    for (int64_t image = 0; image < s.images; ++image)
        for (int64_t i = 0; i < s.height; ++i)
            for (int64_t j = 0; j < s.width; ++j) {
                const T* from = patches + ((image * s.height + i) * s.width + j) * 3 * row;
                T* to = images + (image * (s.height + 2) + i) * stride + j * s.channels;
                for (int k = 0; k < 3; ++k)
                    for (int64_t t = 0; t < row; ++t) to[k * stride + t] += from[k * row + t];
            }
}

template <typename T, int L>
void forward(Shape s, T eps, const T* const* in, T* const* out) {
    using B = Block<T, L>;
    B::forward(s, eps, B::reader(in[0]), in[1], in[2], out[0]);
}

template <typename T, int L>
void backward(Shape s, T eps, const T* const* in, T* const* out) {
    Block<T, L>::backward(s, eps, in[0], in[1], in[2], in[3], out[0], out[1], out[2]);
}

template <typename T, int L>
void dual_forward(Shape s, T eps, const T* const* in, T* const* out) {
    using B = Block<T, L>;
    B::dual_forward(s, eps, B::reader(in[0], in[1]), in[2], in[3], in[4], in[5], out[0], out[1]);
}

template <typename T, int L>
void dual_backward(Shape s, T eps, const T* const* in, T* const* out) {
    Block<T, L>::dual_backward(s, eps, in[0], in[1], in[2], in[3], in[4], in[5], in[6], out[0], out[1], out[2], out[3]);
}

template <typename T, int L, int CIN>
void first_forward(Shape s, T eps, const T* const* in, T* const* out) {
    using B = Block<T, L>;
    B::forward(s, eps, B::template convolver<CIN>(in[0], in[1]), in[2], in[3], out[0]);
}

template <typename T, int L, int CIN>
void first_backward(Shape s, T eps, const T* const* in, T* const* out) {
    Block<T, L>::template first_backward<CIN>(s, eps, in[0], in[1], in[2], in[3], in[4], out[0], out[1], out[2]);
}

template <typename T, int L, int CIN>
void first_dual_forward(Shape s, T eps, const T* const* in, T* const* out) {
    using B = Block<T, L>;
    B::dual_forward(s, eps, B::template convolver<CIN>(in[0], in[1], in[2]), in[3], in[4], in[5], in[6], out[0], out[1]);
}

template <typename T, int L, int CIN>
void first_dual_backward(Shape s, T eps, const T* const* in, T* const* out) {
    Block<T, L>::template first_dual_backward<CIN>(s, eps, in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7], out[0],
                                                   out[1], out[2], out[3]);
}

template <typename T, int L>
void fold(Shape s, T, const T* const* in, T* const* out) {
    fold(s, in[0], out[0]);
}

}  // namespace

// Vectors wider than the machine's registers are taken apart by way of memory, which costs more than all the rest.
#ifdef __AVX512F__
constexpr int WIDEST = 16;
#else
constexpr int WIDEST = 8;
#endif

// channels must be a multiple of 8 (but in fold); pointers are of dense channels-last tensors, or of vectors [channels].
#define EXPORT(NAME, T, FUNCTION, ...)                                                                                  \
    extern "C" void NAME##_##T(int64_t images, int64_t channels, int64_t height, int64_t width, double eps,             \
                               const T* const* in, T* const* out) {                                                     \
        const Shape s{images, channels, height, width};                                                                 \
        channels % WIDEST ? FUNCTION<T, 8, ##__VA_ARGS__>(s, eps, in, out)                                              \
                          : FUNCTION<T, WIDEST, ##__VA_ARGS__>(s, eps, in, out);                                        \
    }
#define EXPORT_BOTH(NAME, ...) EXPORT(NAME, float, __VA_ARGS__) EXPORT(NAME, double, __VA_ARGS__)

EXPORT_BOTH(forward, forward)
EXPORT_BOTH(backward, backward)
EXPORT_BOTH(dual_forward, dual_forward)
EXPORT_BOTH(dual_backward, dual_backward)
EXPORT_BOTH(first1_forward, first_forward, 1)
EXPORT_BOTH(first3_forward, first_forward, 3)
EXPORT_BOTH(first1_backward, first_backward, 1)
EXPORT_BOTH(first3_backward, first_backward, 3)
EXPORT_BOTH(first1_dual_forward, first_dual_forward, 1)
EXPORT_BOTH(first3_dual_forward, first_dual_forward, 3)
EXPORT_BOTH(first1_dual_backward, first_dual_backward, 1)
EXPORT_BOTH(first3_dual_backward, first_dual_backward, 3)
EXPORT_BOTH(fold, fold)
